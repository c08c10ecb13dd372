"""What the protocol hides: the same learners, 5-way 1-shot, under each choice that papers leave unsaid.

How far does a choice move a learner's accuracy, and does it change the order of learners? Nobody's figure yet.
"""
