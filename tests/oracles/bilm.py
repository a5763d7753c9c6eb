"""Bidirectional language-model losses in NumPy float64, word by word; nothing of ctx_jax is used.

Jean et al. 2015, equations 1 to 3; TensorFlow, nn_impl.py, sampled_softmax_loss; bilm-tf, model.py, LanguageModel.
"""

import numpy as np
from scipy.special import logsumexp


def log_uniform(vocab_size):
    """Probability of each word in TensorFlow's log-uniform sampler."""
    k = np.arange(vocab_size, dtype=np.float64)
    return (np.log(k + 2) - np.log(k + 1)) / np.log(vocab_size + 1)


def expected_count(ids, time, vocab_size):
    return 1 - np.exp(-log_uniform(vocab_size)[ids] * time)


def whole_loss(hidden, target, table, bias):
    logits = table @ hidden + bias
    return logsumexp(logits) - logits[target]


def sampled_loss(hidden, target, table, bias, sample, time):
    """One word against a sample; where the sample holds the word itself, once is enough."""
    vocab_size = len(table)
    corrected = lambda i: table[i] @ hidden + bias[i] - np.log(expected_count(i, time, vocab_size))
    logits = [corrected(target)] + [corrected(i) for i in sample if i != target]
    return logsumexp(logits) - logits[0]
