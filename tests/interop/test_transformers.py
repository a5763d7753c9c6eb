"""Beside transformers' own classes on PyTorch: theirs come in, ours go out, all layers and heads the same."""

import dataclasses
import os

import numpy as np
import pytest

from ctx_jax.encoder import BertEncoder, Encoder
from ctx_jax.interop.certificate import verify
from ctx_jax.interop.load import load
from ctx_jax.interop.programs.forward import ProgramOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Both libraries warn of their own future while they are imported and used.
pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = {"vocab_size": 61, "max_position_embeddings": 24}
BERT = COMMON | {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
ROBERTA = BERT | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
ELECTRA = BERT | {"embedding_size": 8}
ALBERT = ELECTRA | {"hidden_act": "gelu_new"}
DISTILBERT = COMMON | {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
CLASSES = {
    "BertModel": BERT,
    "BertForPreTraining": BERT,
    "BertForMaskedLM": BERT | {"hidden_act": "gelu_new"},
    "BertForNextSentencePrediction": BERT | {"hidden_act": "silu"},
    "BertForSequenceClassification": BERT | LABELS,
    "BertForTokenClassification": BERT | LABELS | {"hidden_act": "relu"},
    "BertForQuestionAnswering": BERT,
    "RobertaModel": ROBERTA,
    "RobertaForMaskedLM": ROBERTA,
    "RobertaForSequenceClassification": ROBERTA | LABELS,
    "RobertaForTokenClassification": ROBERTA | LABELS,
    "RobertaForQuestionAnswering": ROBERTA,
    "XLMRobertaForMaskedLM": ROBERTA,
    "CamembertForSequenceClassification": ROBERTA | LABELS,
    "ElectraModel": ELECTRA,
    "ElectraForPreTraining": ELECTRA,
    "ElectraForMaskedLM": ELECTRA,
    "ElectraForSequenceClassification": ELECTRA | LABELS,
    "ElectraForTokenClassification": ELECTRA | {"embedding_size": 16} | LABELS,
    "ElectraForQuestionAnswering": ELECTRA,
    "DistilBertModel": DISTILBERT,
    "DistilBertForMaskedLM": DISTILBERT,
    "DistilBertForSequenceClassification": DISTILBERT | LABELS | {"activation": "relu"},
    "DistilBertForTokenClassification": DISTILBERT | LABELS,
    "DistilBertForQuestionAnswering": DISTILBERT,
    "AlbertModel": ALBERT,
    "AlbertForPreTraining": ALBERT,
    "AlbertForMaskedLM": ALBERT,
    "AlbertForSequenceClassification": ALBERT | LABELS,
    "AlbertForTokenClassification": ALBERT | LABELS,
    "AlbertForQuestionAnswering": ALBERT,
}


def random_model(name, seed=0, **options):
    """Every weight random, biases and LayerNorms too, at sizes that keep attention uneven."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**(CLASSES[name] | options))).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = value.ndim == 1 and "weight" in key
            value.copy_(torch.randn_like(value) * (0.3 if value.ndim == 1 else value.shape[-1] ** -0.5) + norm)
    return model


def inputs(model, seed=0):
    """Rows with padding; RoBERTa's classes take padding from the ids, so there it has their id."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(18) < np.array([18, 11, 5])[:, None]).astype(np.int64)
    ids = rng.integers(5, 61, (3, 18)) * mask + (1 - mask) * (model.config.pad_token_id or 0)
    types = (np.arange(18) > 7) * mask * (getattr(model.config, "type_vocab_size", 1) > 1)
    return ids, mask, types


def their_outputs(model, ids, mask, types):
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if model.config.model_type == "distilbert":
        del given["token_type_ids"]
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in given.items()}, output_hidden_states=True)


def assert_near(ours, theirs, where=slice(None)):
    scale = max(1.0, float(np.abs(theirs[where]).max()))
    np.testing.assert_allclose(ours[where], theirs[where], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", CLASSES)
def test_theirs_come_in_and_go_out_again(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    encoder = Encoder.from_pretrained(tmp_path / "theirs")
    ids, mask, types = inputs(model)
    out, seen = their_outputs(model, ids, mask, types), mask > 0
    found = encoder.encode_ids(ids, mask, types)
    for layer, theirs in enumerate(out.hidden_states):
        assert_near(found.layers[layer], theirs.numpy(), seen)
    heads = {
        "next_sentence": ("sop_logits", "seq_relationship_logits", "logits"),
        "masked_lm": ("prediction_logits", "logits"),
    }
    for head in encoder.config.all_heads:
        logits = encoder.logits(head, ids, mask, types)
        if head == "span_classifier":
            theirs = torch.stack([out.start_logits, out.end_logits], -1).numpy()
        else:
            theirs = out[next(key for key in heads.get(head, ("logits",)) if key in out)].numpy()
        assert logits.shape == theirs.shape
        assert_near(logits, theirs, seen if logits.shape[:2] == seen.shape else slice(None))
    # ElectraModel and its kin without heads are one encoder with BERT's, and leave as what they came as.
    checks = encoder.save_pretrained(tmp_path / "ours")
    assert len(checks) == 2
    assert all(check.passed for check in checks), checks
    assert "transformers" in checks[1].reader
    # Models with heads are compared by what the heads say, those without by layers and pooler.
    assert {check.output for check in checks} <= {"hidden_states", "pooler_output", *encoder.config.all_heads}
    assert verify(tmp_path / "ours") == checks


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM", "AlbertForMaskedLM"])
def test_a_head_that_is_not_tied(name, tmp_path):
    model = random_model(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "theirs")
    encoder = Encoder.from_pretrained(tmp_path / "theirs")
    assert not encoder.config.tied_head
    ids, mask, types = inputs(model)
    theirs = their_outputs(model, ids, mask, types).logits.numpy()
    assert_near(encoder.logits("masked_lm", ids, mask, types), theirs, mask > 0)
    assert all(check.passed for check in encoder.save_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("name", ["BertForPreTraining", "DistilBertForMaskedLM"])
def test_their_pickles_and_shards(name, tmp_path):
    """What torch.save wrote, with tied copies inside, and the same in several files with an index."""
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "shards", max_shard_size=5_000)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    expected = load(tmp_path / "theirs")
    for place in ("shards", "pickle"):
        found = load(tmp_path / place)
        assert found.config == expected.config
        import jax

        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_model_trained_here_is_theirs_too(tmp_path, topics_corpus):
    """A few steps of pre-training with next sentences, exported, loaded by BertForPreTraining: the same logits."""
    from ctx_jax import BertConfig, Experiment, pretrain
    from ctx_jax.data.plan import RowsConfig
    from ctx_jax.objectives.mlm import MaskedLM

    experiment = Experiment(
        data=str(topics_corpus),
        model=BertConfig(600, 32, 2, 2, 64, 64),
        rows=RowsConfig(length=64, kind="pairs"),
        objective=MaskedLM(next_sentence=True),
        steps=3,
        batch_size=8,
    )
    pretrain(experiment, tmp_path / "run", show_progress=False)
    encoder = Encoder.from_pretrained(tmp_path / "run")
    assert isinstance(encoder, BertEncoder)
    checks = encoder.save_pretrained(tmp_path / "out")
    assert [check.passed for check in checks] == [True, True]
    model = transformers.BertForPreTraining.from_pretrained(tmp_path / "out").eval()
    rng = np.random.default_rng(1)
    ids = rng.integers(5, 600, (2, 40))
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids))
    assert_near(encoder.logits("masked_lm", ids), out.prediction_logits.numpy())
    assert_near(encoder.logits("next_sentence", ids), out.seq_relationship_logits.numpy())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The assignment statement binds names."
    theirs = tokenizer(text)["input_ids"]
    ours = [encoder.tokenizer.token_id(token) for token in encoder.encode(text).tokens[0]]
    assert ours == theirs
    if python := os.environ.get("CTX_JAX_ONNX_PYTHON"):
        checks = encoder.save_pretrained(tmp_path / "onnx", "onnx", ProgramOptions(python=python))
        assert "onnxruntime" in checks[0].reader
        assert checks[0].passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 steps of 8 rows of 64" in card
    assert str(topics_corpus.parent) not in card


def test_sizes_of_the_config_go_both_ways(tmp_path):
    from ctx_jax.interop.hugging_face import read_config, write_config

    for name, options in CLASSES.items():
        kind = getattr(transformers, name)
        record = kind.config_class(**options).to_dict()
        config = read_config(record, "x", heads=(), pooler=False)
        again = read_config({**record, **write_config(config), "model_type": record["model_type"]}, "x", heads=())
        assert dataclasses.replace(again, pooler=False) == config
