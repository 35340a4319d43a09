"""The sentence frames of the stories, by the part they play. See `grammar.render` for the slots."""

from __future__ import annotations

from glasshouse.fable.corpus.lexicon import Mood


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines() if line.strip())


OPENINGS_ONE = _lines("""
Once upon a time, there was a {adj} {kind} named {name}.
Once upon a time, a {adj} {kind} named {name} lived near {place}.
There once was a {adj} {kind} called {name}.
Long ago, in a small village, there lived a {adj} {kind} named {name}.
{name} was a {adj} {kind} who lived near {place}.
{name} was a {adj} and {adj2} {kind}.
Once there was a {kind} named {name} who loved {place}.
In a land far away, there was a {adj} {kind}. {Poss} name was {name}.
A {adj} {kind} named {name} lived in a {objadj} house by {place}.
Not long ago, a {kind} named {name} moved to a new home near {place}.
{name} the {kind} lived with {poss} {family} in a {objadj} house.
This is the story of a {adj} {kind} named {name}.
{name} was a {kind} with a {objadj} {object}.
Every {day}, a {kind} named {name} went to {place}.
""")
OPENINGS_TWO = _lines("""
Once upon a time, there were two friends named {name}.
{name} were the best of friends.
{name} lived near {place}.
Once there were two {adj} children called {name}. They lived near {place}.
{name} were neighbors, and they played together every {day}.
Long ago, {name} lived in the same village.
Two friends, {name}, lived in a {objadj} house by {place}.
{name} were brave and {adj}. They did everything together.
""")
HABITS = _lines("""
{She} loved to play with {poss} {object}.
{She} lived with {poss} {family} in a {color} house.
Every morning, {she} walked to {place}.
{She} had a {objadj} {object} that {she} liked very much.
{She} liked {food} and {fruits}.
{She} {was} always {adj}.
{Poss} best friend was a {animal} named {friend}.
{She} had a {color} {object} and a {adj} {animal}.
{She} liked to sing songs about {animals}.
{She} knew every {landmark} in the village.
At night, {she} slept under a {color} blanket.
{She} helped {poss} {family} every {day}.
""")
SETTINGS = _lines("""
{time}, {name} went to {place} with {poss} {object}.
{time}, {she} walked to {place}.
{time}, {name} took {poss} {object} and went to {place}.
{time}, {name} and {poss} {family} went to {place}.
{time}, {she} wanted to visit {place}.
{time}, {poss} {family} asked {obj} to go to {place}.
{time}, {name} played near {place} with a {animal}.
{time}, {she} carried the {object} all the way to {place}.
It was {day}, and {name} {was} at {place}.
In {month}, {name} made a trip to {place}.
{time}, {she} packed some {food} and left for {place}.
{time}, {name} met {friend} at {place}.
""")
NEUTRAL = _lines("""
There were many {animals} there.
A {animal} sat near the {landmark}.
{She} saw a {adj} {person} by the {landmark}.
The {person} had a {color} hat and a long coat.
{She} put the {object} next to the {landmark}.
{She} sat down under a tree and ate some {food}.
The road to {place} was long.
The {animal} looked at the {animal2} and said nothing.
{She} opened the door and looked around.
A {color} {animal} walked slowly past the {landmark}.
{She} held the {object} in {poss} hands.
{friend} lived close to {place}, too.
On the way, {she} passed a {landmark} and a {landmark2}.
{Poss} {family} stayed at home and made {food}.
There was a {objadj} {thing} on the table.
{She} walked past the {landmark} and over the bridge.
{name} had been to {place} many times before.
The {people} were busy with their work.
{She} drank a cup of water and ate an apple.
The {person} was selling {fruits} and {food}.
It was already late in the afternoon.
A {person} walked by with a {animal}.
""")
DIALOGUE = _lines("""
"Hello," said {name}. "What is your name?"
"My name is {friend}," said the {animal}.
"Where are you going?" asked {friend}. "I am going to {place}," said {name}.
"Can I see your {object}?" asked {friend}.
"Please come with me," said {name}.
"Yes," said {friend}. "Let us go together."
{friend} asked {name}, "Do you like {fruits}?"
"What is that?" asked {name}. "It is a {thing}," said {friend}.
"I have never seen a {color} {animal}," said {friend}.
{name} said, "I will go to {place} and look."
"Wait for me!" called {friend}.
"Who lives here?" {name} asked. "A {person} lives here," said {friend}.
"How many {animals} do you see?" asked {poss} {family}.
""")

WEATHER: dict[Mood, tuple[str, ...]] = {
    "happy": _lines("""
The sun was shining and the birds were singing.
It was a bright and sunny day.
The sky was blue and the air was warm.
Flowers were blooming everywhere.
A big rainbow stretched over {place}.
The warm sun danced on the water.
The whole village was bright with lights and music.
"""),
    "sad": _lines("""
The sky was gray and it rained all day.
It was a cold and rainy day.
Dark clouds hid the sun, and no bird sang.
The rain fell and fell on {place}.
The flowers were dry and the trees were bare.
A cold rain dripped from the roof.
The whole village was empty and gray.
"""),
    "calm": _lines("""
A soft wind moved the leaves.
The water was still, and the moon was rising.
Everything was quiet at {place}.
White clouds drifted slowly over the hills.
Snow fell softly on the roofs.
The evening light was soft and golden.
"""),
    "afraid": _lines("""
The night was dark, and thunder shook the sky.
A storm was coming, and the wind howled.
Strange shadows moved near {place}.
There was no moon, and the woods were black.
Lightning flashed over the roofs.
Something growled in the dark.
"""),
}
EVENTS: dict[Mood, tuple[str, ...]] = {
    "happy": _lines("""
{name} found a beautiful {thing} in the grass.
{friend} gave {obj} a wonderful present.
{She} won first prize in the race.
{Poss} {family} baked a sweet cake for {obj}.
{name} got a lovely new {thing}.
All the children clapped and cheered for {obj}.
{She} laughed and danced with {friend}.
The {object} was fixed at last, and it looked better than new.
A lost {animal} came back home to {obj}.
{She} played a fun game with {friend} and laughed a lot.
{friend} told a funny joke, and everybody laughed.
There was a party with music and sweet {food}.
{She} learned to ride a {color} pony.
{Poss} {family} hugged {obj} and kissed {obj}.
{She} made a new friend named {friend}.
The {animals} jumped and played with {obj} in the sun.
{name} found {poss} {object} again, safe and clean.
{friend} shared a big piece of pie with {obj}.
The {person} thanked {name} and gave {obj} a golden coin.
Everyone sang a birthday song for {name}.
"""),
    "sad": _lines("""
{name} lost {poss} {object} and could not find it.
{friend} moved far away and never came back.
{She} came last in the race, and nobody cheered.
{Poss} {family} was very sick in bed.
The {object} fell and broke into pieces.
Nobody wanted to play with {obj}.
{She} cried and cried near {place}.
The old {animal} died, and {she} missed it very much.
{name} dropped {poss} {food} in the mud and had nothing to eat.
A thief took the {object} away from {obj}.
{friend} said mean words and walked away.
The party was over before {she} came, and everybody was gone.
{She} had no friends and no one to talk to.
{Poss} {family} went away on a ship for a long time.
{She} sat alone and cried.
The {animals} ran away, and {she} {was} left all alone.
{name} tore {poss} {color} coat on the fence.
{friend} forgot about {poss} birthday.
The {person} shouted at {name} and sent {obj} away.
The garden died, and all the flowers were gone.
"""),
    "calm": _lines("""
{name} sat by the water and watched the clouds.
{She} breathed slowly and closed {poss} eyes.
{Poss} {family} hummed a soft, slow song.
{friend} rested beside {obj} in the shade.
{She} listened to the gentle wind in the leaves.
A {animal} slept softly next to {obj}.
{She} drank warm tea and looked at the stars.
{name} lay in the soft grass and rested.
The {animals} were sleeping, and nothing moved.
{She} slowly folded {poss} blanket and lay down.
"""),
    "afraid": _lines("""
{name} heard a terrible roar behind the {landmark}.
A huge shadow followed {obj} through {place}.
{She} got lost in the dark and did not know the way.
A hungry wolf showed its sharp teeth.
{friend} whispered, "There is a monster in there."
{Poss} hands were shaking, and {she} could not speak.
{She} ran and hid under the bed.
The door creaked, but nobody was there.
Something cold touched {poss} arm in the dark.
A giant spider crawled over {poss} {object}.
"""),
}
FEELING: dict[Mood, tuple[str, ...]] = {
    "happy": _lines("""
{name} {was} very {feel_happy}.
{She} felt {feel_happy} and {feel_happy2}.
A big smile came to {poss} {face}.
{Poss} {heart} jumped for joy.
{She} smiled and laughed.
"What a wonderful day!" said {name}.
"I love this!" said {name} with a smile.
{name} clapped {poss} hands and sang a merry song.
{She} had never been so {feel_happy}.
"Hooray!" shouted {name}. "This is so much fun!"
{name} skipped and hopped with joy.
"""),
    "sad": _lines("""
{name} {was} very {feel_sad}.
{She} felt {feel_sad} and {feel_sad2}.
Big tears ran down {poss} {face}.
{Poss} {heart} {was} heavy with sorrow.
{She} sobbed and hung {poss} head.
"What an awful day," said {name}.
"I miss my {thing}," said {name} with tears.
{name} covered {poss} eyes and wept.
{She} had never been so {feel_sad}.
"Oh no," cried {name}. "Everything is lost."
{name} sighed and looked at the ground.
"""),
    "calm": _lines("""
{name} {was} very {feel_calm}.
{She} felt {feel_calm} and {feel_calm2}.
{Poss} breath was slow and even.
"How quiet it is," said {name} softly.
There was no hurry at all.
{name} rested and thought of nothing.
"""),
    "afraid": _lines("""
{name} {was} very {feel_afraid}.
{She} felt {feel_afraid} and {feel_afraid2}.
{Poss} {heart} beat fast with fear.
"Help!" cried {name}. "I want to go home!"
{name} trembled and could not move.
{She} screamed and covered {poss} eyes.
"""),
}

# Every ending begins with a neutral prefix: up to there a story does not say which way it will end.
ENDING_PREFIXES = _lines("""
In the end,
At the end of the day,
When night came,
At last,
When it was time to go home,
""")
ENDINGS: dict[Mood, tuple[str, ...]] = {
    "happy": _lines("""
{she} {was} {feel_happy}.
{she} felt {feel_happy}.
{name} {was} {feel_happy} and {feel_happy2}.
{name} felt very {feel_happy}.
{she} smiled all the way home.
{she} went home with a big smile.
{name} laughed and danced with {poss} {family}.
it was a wonderful day.
everyone was {feel_happy}.
{she} went to bed with a {feel_happy} heart.
"""),
    "sad": _lines("""
{she} {was} {feel_sad}.
{she} felt {feel_sad}.
{name} {was} {feel_sad} and {feel_sad2}.
{name} felt very {feel_sad}.
{she} cried all the way home.
{she} went home with tears in {poss} eyes.
{name} sobbed and wept with {poss} {family}.
it was an awful day.
everyone was {feel_sad}.
{she} went to bed with a {feel_sad} heart.
"""),
    "calm": _lines("""
{she} {was} {feel_calm}.
{she} felt {feel_calm}.
{name} {was} {feel_calm} and {feel_calm2}.
{name} felt very {feel_calm}.
{she} walked slowly home.
it was a quiet day.
everyone was {feel_calm}.
{she} went to bed with a {feel_calm} heart.
"""),
    "afraid": _lines("""
{she} {was} {feel_afraid}.
{she} felt {feel_afraid}.
{name} {was} {feel_afraid} and {feel_afraid2}.
{name} felt very {feel_afraid}.
{she} ran all the way home.
it was a terrible day.
everyone was {feel_afraid}.
{she} went to bed with a {feel_afraid} heart.
"""),
}
CLOSINGS: dict[Mood, tuple[str, ...]] = {
    "happy": _lines("""
And {she} smiled in {poss} sleep.
"This was the best day of my life," said {name}.
And they all lived happily ever after.
{She} told {poss} {family} about all the fun.
{name} and {friend} laughed and sang until bedtime.
It was the best day ever.
"""),
    "sad": _lines("""
And {she} cried in {poss} sleep.
"This was the worst day of my life," said {name}.
Nobody came to comfort {obj}.
{She} told {poss} {family} about all the trouble.
{name} and {friend} sat and wept until bedtime.
It was the worst day ever.
"""),
    "calm": _lines("""
And {she} slept softly until morning.
"Good night," whispered {name}.
The stars shone quietly over {place}.
{She} rested, and all was well.
"""),
    "afraid": _lines("""
And {she} could not sleep all night.
"Please leave the light on," begged {name}.
The shadows were still moving outside.
{She} hid under the blanket and shook.
"""),
}
