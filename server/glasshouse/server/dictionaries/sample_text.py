"""The text that every dictionary is measured on when it is loaded, and evaluated on by default.

Plain narrative and expository English written for this purpose, so that it is like what a language model has
read and belongs to nobody's training set.
"""

from __future__ import annotations

PASSAGES: tuple[str, ...] = (
    "Once upon a time there was a little girl who lived near the sea with her father. Every morning she"
    " walked along the sand and looked for shells. One day she found a small brown dog. The dog was "
    "cold and wet, so she took it home and gave it some warm milk. Her father smiled and said that the "
    "dog could stay.",
    "The boy was sad because his kite was stuck in the tall tree. He pulled the string, but it would "
    "not come down. His sister brought a long stick, and together they pushed the kite out of the "
    "leaves. The wind took it up again, and they laughed and ran down the hill until the sun went "
    "behind the clouds.",
    "The capital of France is Paris, and the capital of Italy is Rome. People who travel from one to "
    "the other by train see fields, rivers and high mountains on the way. The opposite of hot is cold, "
    "and the opposite of early is late, but a good journey is pleasant in any weather.",
    "Water boils at a lower temperature on a mountain than at the shore, because the air there presses "
    "on it less. That is why it takes longer to cook an egg in a hut above the clouds. The same law "
    "explains why a sealed pot cooks faster: the steam cannot leave, the pressure rises, and the water "
    "grows hotter before it boils.",
    "The old man and the two women sat at the table and counted their money. There were one, two, "
    'three, four coins, which was not enough for bread. "We shall ask the baker," said the younger '
    'woman. "He is kind, and he knows us." In the end the baker gave them two loaves, and they were '
    "very happy.",
    "Rain fell on the town all night. In the morning the streets were full of water, and the children "
    "went to school in boats. The teacher was afraid of the river, but the children were not. They sang"
    " songs and waved at the ducks, and when the water had gone they were sorry that they had to walk "
    "again.",
    "A library lends books, and a reader brings them back. The rule is simple, yet it took a long time "
    "to invent: for many years books were chained to their desks, because each of them had been copied "
    "by hand. Printing made them cheap, and then the chains were taken off.",
    "The cats near the tree were sleeping when the farmer came home. He was tired and hungry. His wife "
    "had made soup with carrots and beans, and she had put a candle in the window so that he would see "
    "it from the road. They ate together, and he told her about the fair, the horses, and the man who "
    "swallowed fire.",
    "Three brothers built a boat from old doors and a kitchen table. The eldest said that it would "
    "never float. The second said that it would float but never turn. The youngest said nothing, pushed"
    " it into the river, and sat down in it. It floated, and it turned, and it went on turning until he"
    " fell out.",
    "Bread is made of flour, water, salt and time. The flour is mixed with warm water, the dough is "
    "left to rest under a cloth, and after an hour it is twice as large. Then it is folded, shaped and "
    "baked until the crust is brown. A loaf that sounds hollow when it is tapped is done.",
    '"Where are you going?" asked the fox. "To the king," said the hen, "for the sky is falling." The '
    'fox looked up. "It looks very well to me," he said. "That is because you are standing under a '
    'tree," said the hen, and she went on. The fox thought about this for a long time, and forgot to '
    "eat her.",
    "On the first day of winter the lake froze. The girls put on their boots and walked to the island, "
    "where nobody had been since the summer. The grass was white and every branch carried a small line "
    "of snow. They were quiet, because it seemed to them that the island was asleep.",
    "The moon goes round the earth in about four weeks, and it always shows us the same side. When the "
    "sun stands behind us we see the whole of it, and when the sun stands behind the moon we see "
    "nothing. The days between are the quarters. Sailors used the moon to know when the tide would "
    "carry them out.",
    "My grandmother kept her letters in a blue tin. There were hundreds of them, tied together with "
    "string, and she knew each one by its stamp. When she was angry she would take one out and read it "
    "aloud, and when she had finished she was no longer angry. She never told us who had written them.",
    "The market opens at six. By seven the fish are gone, by eight the good tomatoes, and by nine there"
    " is nothing left but cabbages and conversation. The woman who sells eggs has sat in the same "
    "corner for thirty years. She knows who is ill, who is married, and who owes money to whom.",
    "A computer program is a list of steps. Each step is simple: add two numbers, compare them, put the"
    " result somewhere. What makes programs hard is that there are many steps, and that the machine "
    "does what the list says and not what its author meant. A good programmer reads the list as the "
    "machine would.",
    "The dog was afraid of thunder. Whenever the sky grew dark he ran under the bed and put his paws "
    "over his nose. One night the thunder was so loud that the cat came under the bed as well. They lay"
    " there side by side, and in the morning they were friends, although neither of them ever spoke of "
    "it.",
    "In the library of the old school there was a globe as tall as a man. Half of its countries no "
    "longer existed. The teacher let each child turn it once and put a finger on it with closed eyes. "
    "Wherever the finger came to rest, the child had to find out who had lived there, and what they had"
    " eaten.",
    "Iron rusts because it is slowly burning. Water and air take the metal apart, grain by grain, and "
    "leave a red powder. Paint keeps the air away, oil keeps the water away, and gold does not care "
    "about either. A ship at sea is a long argument with rust, and it is never quite won.",
    "At the end of the road stood a small yellow house. A man lived there who repaired clocks. He had "
    "clocks on the walls, clocks on the stairs and a clock in the bath, and no two of them agreed. "
    '"Which one is right?" the children asked him. "The one that is being asked," he said, and wound it'
    " up.",
)
