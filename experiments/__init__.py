"""Studies: continual-learning experiments that run, resume and report by one command.

``python -m experiments`` lists them. A study is one file in ``experiments/studies``;
the rest of this folder is what they share: the engine that runs tasks and seeds
(``engine``), checkpoints, the run folder, the command line and the report.
"""
