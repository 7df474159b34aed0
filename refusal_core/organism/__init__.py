"""The embedded model: a model organism of refusal, trained from scratch on text that our own generator writes.

corpus       what it reads: requests, answers and refusals, made from the word lists beside it
training     pre-training (every instruction is answered, harm is known) and safety tuning (some topics refused)
evaluation   whether it shows the phenomenon, on prompts whose concepts and phrasings it never read
"""
