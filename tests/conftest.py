"""Fixtures that several files share. No test downloads anything; every test starts from the same random numbers."""

import os
import sys
from pathlib import Path

if "TEST_CUDA" not in os.environ:  # which tests/test_cuda.py asks for
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # transformers and torch read them on their import
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts, e.g. train_warp, are no package
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])  # for other processes

import pytest


@pytest.fixture(autouse=True)
def _seed():
    import torch  # not at the top: of pytest -n 2, the process that deals out the tests needs no torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 300 entries; EOS (id 0) and pad (id 1) are two different tokens."""
    from rlhf_min.pretrain import train_tokenizer

    texts = ["The film was great fun.", "The plot was dull and the film was long.", "What a great cast!", "I slept."]
    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture
def tiny_policy(tiny_tokenizer):
    """A GPT-2 of two blocks for that tokenizer, float32, eval mode; its weights are wide enough to have preferences."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=64, n_layer=2, n_embd=16, n_head=2, **ids,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder whose runs/toy/ is an embedded world of 1/20 of the size, with its policy and its reward models."""
    import train_rm
    from rlhf_min import pretrain, toy

    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toy.write_world(toy.FOLDER, reviews=300, train_pairs=100, eval_pairs=50, prompts=100)
        pretrain.main(["--out", toy.POLICY, "--epochs", "6", "--batch-size", "16", "--width", "32"])
        once = ["--epochs", "1", "--accept-weak"]
        train_rm.main(["--out", toy.REWARD_MODEL, *once])
        train_rm.main(["--out", toy.ORDINAL_REWARD_MODEL, "--head", "ordinal", *once])
    return folder


@pytest.fixture
def in_world(world, monkeypatch):
    """The world as the working directory; nothing is drawn, to save time."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("rlhf_min.support.plots.draw", lambda *args: None)
    return world
