"""The words of fable's world: names with a gender, nouns with a number, facts with an answer.

Every list is a latent's range of values, so a list's order and content are part of the labelled sets'
meaning.
"""

from __future__ import annotations

from typing import Literal

Gender = Literal["girl", "boy"]
Mood = Literal["happy", "sad", "calm", "afraid"]
MOODS: tuple[Mood, ...] = ("happy", "sad", "calm", "afraid")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in _phrases(text))


GIRLS = _words("""
Lily Anna Emma Mia Sara Lucy Ella Grace Clara Nora Alice Ruby Daisy Molly Hannah Julia Maria Amy Rosa Zoe
Ivy Eva Lena Nina Tina Kate Jane Mary Susan Betty Wendy Holly Maya Leah Naomi Fiona Greta Heidi Ingrid Joan
Laura Linda Mabel Nancy Olivia Paula Rachel Stella Tessa Ursula Vera Willa Yara Abby Bella Cora Diana Elsa
Flora Gwen Hazel Irene Jenny Karen Lola Megan Nelly Opal Penny Polly Rita Sally Tara Uma Violet Wilma Zara
Agnes Bridget Celia
""")
BOYS = _words("""
Tom Ben Max Sam Jack Leo Tim Peter Paul John Adam Noah Oscar Henry Felix Hugo Jacob Lucas Mark Nick Otto
Oliver Simon Victor Walter Daniel David Edward Frank George Harry Ian James Kevin Liam Martin Nathan Owen
Philip Robert Stephen Theo Thomas William Alan Albert Andrew Anton Arthur Bruno Carl Charlie Colin Dennis
Eric Ethan Finn Fred Gary Greg Hans Isaac Ivan Jasper Joel Karl Kurt Louis Luke Matthew Milo Neil Omar
Patrick Ralph Roger Rupert Toby Vincent Zack
""")
GENDER_OF: dict[str, Gender] = {**dict.fromkeys(GIRLS, "girl"), **dict.fromkeys(BOYS, "boy")}
NAMES = GIRLS + BOYS

# Nouns come as (singular, plural): the number is the latent, the form only shows it.
_IRREGULAR: dict[str, str] = _pairs("""
mouse:mice, goose:geese, wolf:wolves, pony:ponies, bunny:bunnies, puppy:puppies, fox:foxes,
butterfly:butterflies, child:children, man:men, woman:women, baby:babies, bench:benches, box:boxes,
brush:brushes, dress:dresses, leaf:leaves, knife:knives, shelf:shelves, berry:berries, cherry:cherries,
peach:peaches, lady:ladies, bush:bushes, church:churches, torch:torches, glass:glasses, city:cities,
calf:calves, ox:oxen, kitty:kitties, fairy:fairies, beach:beaches, bus:buses
""")


def plural(noun: str) -> str:
    """The plural form of a noun of this lexicon."""
    return _IRREGULAR.get(noun, noun + "s")


ANIMALS = _words("""
cat dog fox bear rabbit mouse bird duck frog horse cow pig goat hen owl wolf lion tiger monkey turtle
squirrel hedgehog goose pony bunny puppy kitten lamb bee butterfly ant spider snail swan crow robin beaver
badger otter donkey camel elephant whale seal penguin parrot eagle mole lizard calf
""")
PEOPLE = _words("""
child man woman teacher farmer king queen baker sailor doctor painter singer soldier neighbor baby hunter
gardener driver dancer shepherd nurse prince princess lady cook fairy wizard giant
""")
OBJECTS = _words("""
ball kite book doll hat drum boat bell lamp basket ring coin key box brush cup blanket scarf mirror flute
whistle puzzle wagon bucket shell stone feather flower apple cake candle coat dress map clock spoon button
balloon bracelet necklace ribbon robot train truck bike rope ladder bottle umbrella pillow pencil letter
painting crayon sled
""")
LANDMARKS = _words("""
tree house bridge gate wall fence pond lake river hill barn church tower bench well garden road window door
table rock bush cave tent wagon boat box chair shelf basket fountain statue farm shop school
""")
PLACES = _phrases("""
the forest, the park, the garden, the market, the river, the lake, the beach, the farm, the village,
the school, the library, the castle, the meadow, the old bridge, the harbor, the hill, the mountain,
the barn, the playground, the zoo, the museum, the bakery, the big tree, the town square, the train station,
the old mill, the island, the pond, the valley, the orchard, the toy shop, the swimming pool, the church,
the stone tower, the cave, the cornfield, the waterfall, the fountain, the windmill, the little shop,
the stable, the green field, the seaside, the city, the woods, the lighthouse, the campsite, the stream,
the hospital, the kitchen
""")
FOODS = _words("bread soup cheese honey milk pie jam rice pasta porridge salad toast butter cake stew corn")
FRUITS = _words("apple pear plum peach cherry berry lemon orange banana grape melon fig")
COLORS = _words("red blue green yellow white black brown pink purple orange gray golden silver")
ADJECTIVES = _words("""
little big small old young tall tiny brave kind clever quiet gentle funny curious shy busy strong friendly
honest polite careful playful sleepy hungry lazy silly wise graceful
""")
OBJECT_ADJECTIVES = _words("""
little big small old new round shiny pretty wooden tiny soft heavy bright smooth plain long colorful strange
simple lovely
""")
FAMILY_SHE = _words("mother sister grandmother aunt")
FAMILY_HE = _words("father brother grandfather uncle")
FAMILY = FAMILY_SHE + FAMILY_HE
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
TIMES = _phrases("""
one day, one morning, one afternoon, one evening, one Saturday, one Sunday, early one morning,
one spring day, one autumn day, one summer day, one winter day, after lunch, after breakfast, before dinner,
after school, that day, the next day, the next morning, later that day
""")
NUMBERS = _words("one two three four five six seven eight nine ten")

FEELINGS: dict[Mood, tuple[str, ...]] = {
    "happy": _words("happy glad cheerful joyful merry delighted proud excited"),
    "sad": _words("sad unhappy gloomy lonely miserable heartbroken sorrowful upset"),
    "calm": _words("calm peaceful relaxed restful quiet content"),
    "afraid": _words("afraid scared frightened terrified fearful nervous"),
}

CAPITALS: dict[str, str] = _pairs("""
France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, England:London, Ireland:Dublin,
Scotland:Edinburgh, Norway:Oslo, Sweden:Stockholm, Denmark:Copenhagen, Finland:Helsinki, Poland:Warsaw,
Austria:Vienna, Hungary:Budapest, Greece:Athens, Turkey:Ankara, Russia:Moscow, Ukraine:Kyiv,
Romania:Bucharest, Bulgaria:Sofia, Serbia:Belgrade, Croatia:Zagreb, Belgium:Brussels, Switzerland:Bern,
Egypt:Cairo, Kenya:Nairobi, Ghana:Accra, Nigeria:Abuja, Senegal:Dakar, Morocco:Rabat, Tunisia:Tunis,
Japan:Tokyo, China:Beijing, Thailand:Bangkok, Vietnam:Hanoi, Nepal:Kathmandu, Indonesia:Jakarta,
Iran:Tehran, Iraq:Baghdad, Jordan:Amman, Lebanon:Beirut, Syria:Damascus, Canada:Ottawa, Cuba:Havana,
Peru:Lima, Chile:Santiago, Ecuador:Quito, Colombia:Bogota, Jamaica:Kingston, Australia:Canberra,
Iceland:Reykjavik
""")

OPPOSITES: tuple[tuple[str, str], ...] = tuple(
    _pairs("""
hot:cold, big:small, tall:short, fast:slow, happy:sad, old:young, good:bad, light:dark, wet:dry, hard:soft,
full:empty, open:closed, clean:dirty, loud:quiet, strong:weak, rich:poor, early:late, near:far, high:low,
deep:shallow, thick:thin, wide:narrow, sweet:sour, smooth:rough, sharp:dull, brave:cowardly, kind:cruel,
clever:foolish, awake:asleep, alive:dead, right:wrong, true:false, easy:difficult, safe:dangerous,
noisy:silent, beautiful:ugly, inside:outside, up:down, over:under, day:night, summer:winter,
morning:evening, begin:finish, come:go, give:take, buy:sell, push:pull, win:lose, laugh:cry, love:hate,
remember:forget, arrive:leave, friend:enemy, first:last, always:never, before:after, many:few,
everything:nothing
""").items()
)
OPPOSITE_OF: dict[str, str] = {**dict(OPPOSITES), **{b: a for a, b in OPPOSITES}}
# Pairs that describe a thing, for use inside stories ("The soup was not hot. It was cold.").
_OF_THINGS = _words("""
hot big tall fast old good light wet hard full open clean loud strong thick wide smooth sharp
""")
THING_OPPOSITES: tuple[tuple[str, str], ...] = tuple(pair for pair in OPPOSITES if pair[0] in _OF_THINGS)
