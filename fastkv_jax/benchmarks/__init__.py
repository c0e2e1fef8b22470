"""What is measured of speed, and how."""
