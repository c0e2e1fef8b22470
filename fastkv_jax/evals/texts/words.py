"""Words to hide and to count: single ones, and many more as "amber-anchor". None is a part of another of its kind."""

_ADJECTIVES = """
abrupt absent active alert alpine amber ample ancient angry animal arctic ardent arid ashen atomic
autumn awake azure bare basic beige bitter blind blithe blond blue blunt bold brave brief bright brisk broad
bronze brown bulky busy calm candid careful casual cautious central certain cheap cheerful chilly civic classic clean
clear clever cloudy coarse cold colossal comic compact copper coral cosmic costly crimson crisp crooked crude
curious curly daily damp dapper dark dear deep dense dim distant dizzy double drowsy dry dusty eager early earnest
eastern easy elastic elder electric elegant empty endless equal exact exotic fair faithful famous fancy feeble fierce
final firm flat floral fluent fond formal fragile frank free fresh frosty frozen gentle giant gilded glad gloomy
golden graceful grand grave gray great green gritty half handy happy hasty hazel heavy hollow honest huge humble
hungry ideal idle iron ivory jolly jovial keen kind large late lavish lazy level light lilac lively local
lofty lonely lucid lucky lunar magenta major maroon mellow merry mighty mild minor misty modern modest narrow
native naval neat nervous nimble noble northern novel odd olive opal open orange ornate outer pale paper patient
peaceful perfect pink placid plain pleasant plump polite polar prime proper proud prudent purple quaint quick quiet
radiant rapid rare ready regal remote rigid ripe robust rosy round royal rugged rural rustic sacred salty scarlet
secret sedate serene severe shaggy sharp shiny shrewd shy silent silky silver simple sincere sleepy slender slim slow
small smooth snowy sober soft solar solemn solid somber southern spare spicy splendid square stable stark steady steep
stout strange strict strong sturdy subtle sudden sunny superb supple sweet swift tall tame tender thick thin
thorough tidy timid tiny tranquil tropical true twin urban urgent useful vacant vague valiant vast velvet violet vivid
warm wary western wide wild windy wise witty wooden young zealous
""".split()

_NOUNS = """
acorn airport album almond anchor ankle antler apple apron artist attic avenue badger bakery balcony ballad
bamboo banner barley barrel basin basket beacon beaver bell bench berry bishop blanket blossom bottle boulder bridge
broom bucket buffalo button cabin cactus camel canal candle canoe canyon captain carpet castle cattle cavern cello
chapel cherry chimney cinema circus citadel cliff clock clover coast cobbler coffee column comet compass cottage
cradle crane crater cricket crown crystal cushion cypress daisy dancer desert diamond dinner doctor dolphin donkey
dragon drawer driver drum eagle echo elbow elephant ember emperor engine envelope estate evening fabric falcon
farmer feather fence ferry fiddle finger flagon flute forest fossil fountain fox furnace galaxy garden garlic gazelle
geyser ginger glacier glove goblet gondola granite grape guitar hammer harbor harvest hawk hedge helmet heron
hinge horizon hornet hotel hunter igloo insect island jacket jaguar jasmine jewel journal jungle juniper kayak kennel
kettle kingdom kitchen kite ladder lagoon lantern laurel lemon leopard library lily lizard lobster locket lotus
magnet mango mantle maple marble market marsh meadow melody merchant meteor mill mirror mitten monarch monkey moss
mountain museum napkin nectar needle nickel notebook nutmeg oak oasis ocean onion orchard organ oven owl
oyster paddle painter palace panther parrot pasture peach peacock pebble pelican pencil pepper piano pigeon pillow
pilot pirate planet plaza pocket pond poplar porch potter prairie prism puppet pyramid quarry quartz quilt
rabbit raccoon radish raven reef ribbon robin rocket saddle sailor salmon sandal satchel saucer scarf school
shadow shelter shepherd sparrow spider spoon spruce squirrel statue stream summit sunset swallow swan tailor tavern
teapot temple thimble thistle throne thunder tiger timber tower trumpet tulip tunnel turnip turtle umbrella valley
vessel village vine viola volcano wagon walnut walrus weasel whistle willow window winter wizard wolf zebra
""".split()

SINGLE: tuple[str, ...] = (*_ADJECTIVES, *_NOUNS)
COUNT = len(_ADJECTIVES) * len(_NOUNS)


def word(index: int) -> str:
    """The double word with this index, below `COUNT`."""
    return f"{_ADJECTIVES[index // len(_NOUNS)]}-{_NOUNS[index % len(_NOUNS)]}"
