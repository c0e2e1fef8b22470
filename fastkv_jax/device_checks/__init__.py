"""What is checked of a device: each step a module whose `checks(platform, quick)` makes them."""
