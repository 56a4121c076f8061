"""Which item of a data set stands at which position of a run: a pure function of the seed, over N items.

item      what a task deals: a window of text, a conversation, an image, a click; items are numbered from 0 to N - 1
epoch     every item once, in the order permutation(seed, epoch)
position  how many items were taken: position k is item k % N in the order of epoch k // N
lane      what a rank walks where rounds have no fixed size (lanes.py)
mixture   several data sets, each visited as often as its share says (mixture.py)
client    owner of whole documents, which are items that belong together (clients.py)

Nothing here reads data, and nothing needs torch.
"""
