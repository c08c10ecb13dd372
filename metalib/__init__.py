"""Few-shot meta-learning as functions of tensors: no files, no configuration, no global seed.

The public names, each in the module that defines it:

    algorithms.names(), algorithms.build(name, hyper)      the meta-learners; read algorithms/maml.py first
    types: TaskBatch, TaskLoss, SplitLoss, MetaLearner, MetaGradient, Params      and the legend of shapes
    training: train, Outer, Progress, Result, Diverged     the outer loop
    evaluation: evaluate, Accuracy;  comparison: interval, differences, shift, ranking
    models.conv4.Conv4, models.loss.Conv4Loss              the network of the published Omniglot results, and its loss
    data.tasks: draw, gather, Tasks                        few-shot tasks out of one array of images
    inner, numerics, tree                                  what learners are made of: inner loops, solvers, arithmetic
    randomness.generator                                   a generator for each purpose
"""
