"""What each number means, and who came up with it."""

from __future__ import annotations

from ctx_jax.atlas.results import Atlas

SOURCES = {
    "Ethayarajh 2019": (
        "Kawin Ethayarajh. How contextual are contextualized word representations? EMNLP 2019.",
        "https://aclanthology.org/D19-1006",
    ),
    "Tenney et al. 2019a": (
        "Ian Tenney et al. What do you learn from context? Probing for sentence structure in contextualized word "
        "representations. ICLR 2019.",
        "https://arxiv.org/abs/1905.06316",
    ),
    "Tenney et al. 2019b": (
        "Ian Tenney, Dipanjan Das, Ellie Pavlick. BERT rediscovers the classical NLP pipeline. ACL 2019.",
        "https://aclanthology.org/P19-1452",
    ),
    "Hewitt and Liang 2019": (
        "John Hewitt, Percy Liang. Designing and interpreting probes with control tasks. EMNLP 2019.",
        "https://aclanthology.org/D19-1275",
    ),
    "Hewitt and Manning 2019": (
        "John Hewitt, Christopher Manning. A structural probe for finding syntax in word representations. NAACL 2019.",
        "https://aclanthology.org/N19-1419",
    ),
    "Voita and Titov 2020": (
        "Elena Voita, Ivan Titov. Information-theoretic probing with minimum description length. EMNLP 2020.",
        "https://aclanthology.org/2020.emnlp-main.14",
    ),
    "Roy and Vetterli 2007": (
        "Olivier Roy, Martin Vetterli. The effective rank: a measure of effective dimensionality. EUSIPCO 2007.",
        "https://infoscience.epfl.ch/record/110188",
    ),
    "Kornblith et al. 2019": (
        "Simon Kornblith et al. Similarity of neural network representations revisited. ICML 2019.",
        "https://arxiv.org/abs/1905.00414",
    ),
    "Loureiro et al. 2021": (
        "Daniel Loureiro et al. Analysis and evaluation of language models for word sense disambiguation. "
        "Computational Linguistics 47(2), 2021.",
        "https://aclanthology.org/2021.cl-2.14",
    ),
    "Loureiro et al. 2022": (
        "Daniel Loureiro, Alípio Mário Jorge, Jose Camacho-Collados. LMMS reloaded: Transformer-based sense embeddings "
        "for disambiguation and beyond. Artificial Intelligence 305, 2022.",
        "https://arxiv.org/abs/2105.12449",
    ),
    "not confirmed": (
        "Numbers that are quoted in the field for this model; we have not found the table that they stand in.",
        "",
    ),
    "Peters et al. 2018": (
        "Matthew Peters et al. Deep contextualized word representations. NAACL 2018.",
        "https://aclanthology.org/N18-1202",
    ),
}

LAYERS = [
    ("Layer", "0 is what goes into the first layer, before any context; L is the last one. Relative depth is l/L."),
]
TASKS = [
    (
        "Score and band",
        "The probe's metric on the test examples, in hundredths; the band is its 95 % confidence interval. A probe is "
        "a small classifier that learns from vectors which are held fixed. (Tenney et al. 2019a; trees: Hewitt and "
        "Manning 2019)",
    ),
    ("Baselines", "What one gets without any model, such as each word type's commonest label."),
    (
        "Selectivity",
        "The score less that of the same probe on a control task, whose labels are drawn for each word type by chance. "
        "A low one means that the probe could learn anything by heart. (Hewitt and Liang 2019)",
    ),
    ("Mix", "A probe on a weighted sum of all layers, with weights that are learnt. (Peters et al. 2018)"),
    (
        "Expected layer, centre of gravity",
        "Where a task is solved: the first weighs each layer by what it adds to the mix of those below it (equation "
        "3), the second by the weights of the mix (equation 2). (Tenney et al. 2019b)",
    ),
    (
        "Bits a label, compression",
        "Length of the labels in an online code that uses the probe; compression is that of a uniform code divided by "
        "it. It counts how hard it is to get the labels out, besides how well. (Voita and Titov 2020)",
    ),
]
GEOMETRY = [
    ("Anisotropy", "Mean cosine of two random words: 0 if vectors point everywhere alike. (Ethayarajh 2019)"),
    ("Self-similarity", "Mean cosine of a word type's occurrences: 1 if context changes nothing. (Ethayarajh 2019)"),
    ("Intra-sentence similarity", "Mean cosine of a sentence's words with their mean. (Ethayarajh 2019)"),
    (
        "Explained variance",
        "Share of a word type's variance along one direction: how well one vector a type would do. (Ethayarajh 2019)",
    ),
    ("Adjusted", "Less what random words give in the same layer. (Ethayarajh 2019, section 4)"),
    (
        "Effective rank, participation ratio",
        "How many dimensions vectors fill: exp of the entropy of the covariance's spectrum (Roy and Vetterli 2007), "
        "and (Σλ)² / Σλ².",
    ),
    ("Outlier dimensions", "Those whose mean lies more than 3 standard deviations from the mean of all means."),
    ("CKA", "Linear centred kernel alignment: 1 if two layers are alike but for a rotation. (Kornblith et al. 2019)"),
]
SENSES = [
    (
        "Nearest mean, nearest occurrence",
        "A word's sense is that of the nearest of its senses' mean vectors, or of its nearest training occurrence "
        "(1-NN). Nothing is trained. (Loureiro et al. 2021)",
    ),
    ("Most frequent sense", "Always the sense that is commonest in training: hard to beat."),
    ("Macro-F1", "By the nearest mean, averaged over a word's senses and then over words: rare senses count as much."),
]
SENTENCES = [
    (
        "Sentence score",
        "Spearman's correlation, times 100, of the cosine of two texts' vectors with what people say about them.",
    ),
    ("Pooling and repair", "How words' vectors become one, and what is done to it before cosines are taken."),
]
ADVICE = [
    (
        "Advice",
        "The best layer is the lowest one within the best one's interval. The shorter model is the fewest layers whose "
        "best is within one point; its FLOPs are those of a token in a row of 128, as a share of the whole model's.",
    ),
]


def defined(atlas: Atlas) -> list[tuple[str, str]]:
    """Terms that this atlas uses."""
    parts = {"tasks": TASKS, "geometry": GEOMETRY, "senses": SENSES, "sentences": SENTENCES, "advice": ADVICE}
    used = [terms for part, terms in parts.items() if any(getattr(model, part) for model in atlas.models)]
    return LAYERS + [term for terms in used for term in terms]


def cited(texts: list[str]) -> list[tuple[str, str]]:
    """Sources that the texts name."""
    return [source for name, source in sorted(SOURCES.items()) if any(name in text for text in texts)]
