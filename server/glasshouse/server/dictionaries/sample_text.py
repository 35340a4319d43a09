"""The text that every dictionary is measured on when it is loaded, and evaluated on by default.

Plain narrative and expository English written for this purpose, so that it is like what a language model has
read and belongs to nobody's training set.
"""

from __future__ import annotations

PASSAGES: tuple[str, ...] = (
    "Once upon a time there was a little girl who lived near the sea with her father. Every morning she walked along "
    "the sand and looked for shells. One day she found a small brown dog. The dog was cold and wet, so she took it "
    "home and gave it some warm milk. Her father smiled and said that the dog could stay.",
    "The boy was sad because his kite was stuck in the tall tree. He pulled the string, but it would not come down. "
    "His sister brought a long stick, and together they pushed the kite out of the leaves. The wind took it up again, "
    "and they laughed and ran down the hill until the sun went behind the clouds.",
    "The capital of France is Paris, and the capital of Italy is Rome. People who travel from one to the other by train "
    "see fields, rivers and high mountains on the way. The opposite of hot is cold, and the opposite of early is late, "
    "but a good journey is pleasant in any weather.",
    "Water boils at a lower temperature on a mountain than at the shore, because the air there presses on it less. That "
    "is why it takes longer to cook an egg in a hut above the clouds. The same law explains why a sealed pot cooks "
    "faster: the steam cannot leave, the pressure rises, and the water grows hotter before it boils.",
    "The old man and the two women sat at the table and counted their money. There were one, two, three, four coins, "
    'which was not enough for bread. "We shall ask the baker," said the younger woman. "He is kind, and he knows us." '
    "In the end the baker gave them two loaves, and they were very happy.",
    "Rain fell on the town all night. In the morning the streets were full of water, and the children went to school in "
    "boats. The teacher was afraid of the river, but the children were not. They sang songs and waved at the ducks, and "
    "when the water had gone they were sorry that they had to walk again.",
    "A library lends books, and a reader brings them back. The rule is simple, yet it took a long time to invent: for "
    "many years books were chained to their desks, because each of them had been copied by hand. Printing made them "
    "cheap, and then the chains were taken off.",
    "The cats near the tree were sleeping when the farmer came home. He was tired and hungry. His wife had made soup "
    "with carrots and beans, and she had put a candle in the window so that he would see it from the road. They ate "
    "together, and he told her about the fair, the horses, and the man who swallowed fire.",
)
