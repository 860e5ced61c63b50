"""Models and tokenizers by name, and weights as dictionaries."""

import copy
import http.server
import re
import socket
import threading
import time
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPTBigCodeConfig,
    PreTrainedTokenizerFast,
)

from rlhf_min.errors import UserError
from rlhf_min.models import (
    _load,
    context_length,
    eos_token_ids,
    get_weights,
    load_classifier,
    load_policy,
    load_tokenizer,
    save_model,
    set_weights,
    trained_weights,
)
from rlhf_min.sources import check_source, find_model, hub_refusal

CPU = torch.device("cpu")
MISSING = ["runs/rm", "./nothing", "/nothing/at/all", "~/model", "nothing", "a/b/c", "owner/name"]


@pytest.fixture
def folder(tmp_path, tiny_policy, tiny_tokenizer):
    """The tiny policy, saved."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "policy")
    return str(tmp_path / "policy")


def word_tokenizer(size=50, **special):
    """A word-level tokenizer of `size` words with the given special tokens, and no others."""
    vocab = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w0")), **special)


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path, tiny_policy, tiny_tokenizer):
    """T65: transformers 5 would keep a checkpoint's bfloat16; here every parameter is float32, in both loaders."""
    save_model(copy.deepcopy(tiny_policy).to(torch.bfloat16), tiny_tokenizer, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    for model, _ in (load_policy(str(tmp_path), CPU, 32), load_classifier(str(tmp_path), CPU, new_head=True)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_policy_is_in_eval_mode(folder):
    """T5: dropout is off in a loaded policy: two passes are equal."""
    model, _ = load_policy(folder, CPU, 32)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_policy(name, CPU, 32)])
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_model_fails_at_once_with_one_line(name, load):
    """T69: a missing path, a two-part name and an unreachable hub included, fails in under a second with one line."""
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"^{re.escape(name)}: no such folder") as error:
        load(name)
    assert time.perf_counter() - start < 1
    assert "\n" not in str(error.value)


def test_hub_names_are_told_from_paths(monkeypatch):
    """T69: the hub is asked only for owner/name; what is written like a path is a path."""
    assert find_model("owner/name") == "owner/name"
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: pytest.fail("asked the hub"))
    for name in MISSING[:-1]:
        with pytest.raises(UserError):
            load_tokenizer(name)


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every HEAD with `code` and `headers`, and remembers what was asked for."""

    code, headers_sent, asked = 404, {}, []

    def do_HEAD(self):
        self.asked.append(self.path)
        self.send_response(self.code)
        for header in self.headers_sent.items():
            self.send_header(*header)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """A server on this machine in the hub's place; its class says what it answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answer,), {"asked": []}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    yield server.RequestHandlerClass
    server.shutdown()
    server.server_close()


NO_HUB, NOTHING = "the hub cannot be reached", "the hub has nothing of that name that is open to everybody"
ANSWERS = {
    "a file": (200, {}, None, ""),
    "a proxy that knows nothing": (404, {}, None, NO_HUB),
    "a proxy that forbids": (403, {}, None, NO_HUB),
    "a proxy that has no way": (502, {}, None, NO_HUB),
    "the hub, without this file": (404, {"X-Error-Code": "EntryNotFound"}, None, ""),
    "the hub, without this repository": (404, {"X-Error-Code": "RepoNotFound"}, None, NOTHING),
    "the hub, which says so to strangers": (401, {"X-Error-Code": "RepoNotFound"}, None, NOTHING),
    "the hub, where one must ask first": (401, {"X-Error-Code": "GatedRepo"}, None, NOTHING),
    "the hub, where a token may open it": (401, {"X-Error-Code": "RepoNotFound"}, "hf_token", ""),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_counts_as_the_hub(endpoint, monkeypatch, name):
    """An HTTP error is the hub's own only with its header; with a token, a repository may be there all the same."""
    endpoint.code, endpoint.headers_sent, token, refusal = ANSWERS[name]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert hub_refusal("owner/name/resolve/main/config.json") == refusal
    assert endpoint.asked == ["/owner/name/resolve/main/config.json"]
    if refusal:
        with pytest.raises(UserError, match=f"^owner/name: no such folder, not in the hub's cache, and {refusal}$"):
            load_tokenizer("owner/name")
        monkeypatch.setattr("rlhf_min.sources.importlib.util.find_spec", lambda name: name)  # has `datasets`
        with pytest.raises(UserError, match=f"^owner/name:test is no local file, and {refusal}; give a .jsonl file$"):
            check_source("owner/name:test")
        assert endpoint.asked[-1] == "/datasets/owner/name/resolve/main/README.md"


def test_the_hub_is_asked_once_and_shortly(monkeypatch):
    """T69: one request with a short time-out; no connection is no hub; offline, none is asked."""
    seen = []

    def urlopen(request, timeout):
        seen.append((request.full_url, timeout))
        raise answer

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_refusal("x") == NO_HUB
    assert seen == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    for answer in (urllib.error.URLError("no route"), TimeoutError()):  # noqa: B007, urlopen reads it
        assert hub_refusal("x") == NO_HUB
    assert len(seen) == 2
    assert all(url == "https://hub.invalid/x" and timeout <= 2 for url, timeout in seen)


def test_what_is_no_web_server_is_no_hub(monkeypatch, capfd):
    """An endpoint that speaks another language, or is no address, is the hub that cannot be reached, in one line."""
    server = socket.create_server(("127.0.0.1", 0))

    def greet():
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        connection.close()

    threading.Thread(target=greet, daemon=True).start()
    monkeypatch.setattr("threading.excepthook", threading.__excepthook__)  # prints; pytest's would warn
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for address in (f"http://127.0.0.1:{server.getsockname()[1]}", "https://no address"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert hub_refusal("x") == NO_HUB
    server.close()
    assert capfd.readouterr().err == ""


NOT_TRUSTED = {"trust_remote_code": False}  # code in a model folder never runs, not even after a y on the terminal


class Hub:
    """A class like AutoTokenizer whose models are in no cache, but on the hub (or fail there with `error`)."""

    error = None

    @classmethod
    def from_pretrained(cls, name, local_files_only=False, **kwargs):
        if local_files_only:
            raise OSError("not in the cache")
        if cls.error is not None:
            raise cls.error
        return name, kwargs


def test_a_hub_name_is_loaded_where_the_hub_answers(monkeypatch):
    """A name owner/name that is in no cache comes from the hub; a failure there is one line with the name."""
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: "")
    assert _load(Hub, "owner/name", dtype=torch.float32) == ("owner/name", NOT_TRUSTED | {"dtype": torch.float32})
    monkeypatch.setattr(Hub, "error", OSError("owner/name is not a valid model identifier\nIf this is a private one"))
    with pytest.raises(UserError, match=r"^owner/name cannot be loaded from the hub: .*identifier$"):
        _load(Hub, "owner/name")


def test_a_failure_without_a_message_is_one_line(monkeypatch):
    """An exception whose message is empty still gives a line that names the model."""
    monkeypatch.setattr("rlhf_min.sources.hub_refusal", lambda path: "")
    monkeypatch.setattr(Hub, "error", OSError())
    with pytest.raises(UserError, match=r"^owner/name cannot be loaded"):
        _load(Hub, "owner/name")


def test_a_folder_without_a_model_is_refused(tmp_path):
    """An existing folder without config.json is named, and never looked up on the hub."""
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"no config\.json in it or in its model/"):
        load_policy(str(tmp_path), CPU, 32)


def test_a_run_folder_stands_for_its_model(tmp_path, tiny_policy, tiny_tokenizer):
    """The folder of a run is read from its model/."""
    save_model(tiny_policy, tiny_tokenizer, tmp_path / "run" / "model")
    model, _ = load_policy(str(tmp_path / "run"), CPU, 32)
    assert torch.equal(model.transformer.wte.weight, tiny_policy.transformer.wte.weight)
    assert find_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no_such_type"}', "{}"])
def test_a_broken_config_is_one_line(tmp_path, folder, content):
    """A config.json that is cut off, empty or of an unknown type is refused by the folder's name."""
    (tmp_path / "policy" / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(folder)} cannot be loaded") as error:
        load_policy(folder, CPU, 32)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(tmp_path, folder):
    """A safetensors file that is cut off is refused by the folder's name."""
    file = tmp_path / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"^{re.escape(folder)} cannot be loaded"):
        load_policy(folder, CPU, 32)


def test_pickled_weights_are_refused(tmp_path, folder, tiny_policy):
    """Weights are read from safetensors only: a pickle could run any program."""
    (tmp_path / "policy" / "model.safetensors").unlink()
    torch.save(tiny_policy.state_dict(), tmp_path / "policy" / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(folder, CPU, 32)


def test_save_and_load_round_trip(folder, tiny_policy, tiny_tokenizer):
    """What save_model writes, transformers reads on its own: same logits, same tokens, EOS and pad still two tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The film was great.")["input_ids"]])
    assert ids.tolist()[0] == tiny_tokenizer("The film was great.")["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, tiny_policy(input_ids=ids).logits)


def test_get_weights_is_a_copy(tiny_policy):
    """T37, T46: no later step changes what get_weights returned, and no gradient hangs on it."""
    before = get_weights(tiny_policy)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        for parameter in tiny_policy.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not any(tensor.requires_grad for tensor in before.values())
    live = trained_weights(tiny_policy)
    assert all(torch.equal(live[name], kept[name] + 1.0) for name in kept)
    assert live["transformer.wte.weight"] is tiny_policy.transformer.wte.weight


def test_every_parameter_once_and_no_buffer(tiny_policy):
    """T48: a tied tensor appears once, every other parameter too, and neither buffers nor frozen weights do."""
    weights = get_weights(tiny_policy)
    assert "lm_head.weight" not in weights
    assert list(weights) == [name for name, _ in tiny_policy.named_parameters()]
    assert sum(w.numel() for w in weights.values()) == sum(p.numel() for p in tiny_policy.parameters())
    tiny_policy.transformer.wpe.weight.requires_grad = False
    assert set(weights) - set(get_weights(tiny_policy)) == {"transformer.wpe.weight"}


def test_set_weights_round_trip(tiny_policy):
    """T46, T48: set_weights(get_weights) restores the model to the bit, its tied head too, and keeps the dictionary."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits, weights = tiny_policy(input_ids=ids).logits, get_weights(tiny_policy)
        set_weights(tiny_policy, {name: torch.zeros_like(w) for name, w in weights.items()})
        assert tiny_policy(input_ids=ids).logits.abs().max() == 0
        set_weights(tiny_policy, weights)
        assert torch.equal(tiny_policy(input_ids=ids).logits, logits)
        assert tiny_policy.lm_head.weight is tiny_policy.transformer.wte.weight
        tiny_policy.transformer.wte.weight.zero_()
    assert weights["transformer.wte.weight"].abs().max() > 0


@pytest.mark.parametrize("listed, expected", [([1, 2], [0, 1, 2]), (2, [0, 2]), (0, [0]), (None, [0])])
def test_all_eos_tokens_of_the_generation_config_count(tmp_path, tiny_policy, tiny_tokenizer, listed, expected):
    """T4: an answer ends with the tokenizer's EOS or with any id that the saved generation config lists."""
    tiny_policy.generation_config.eos_token_id = listed
    save_model(tiny_policy, tiny_tokenizer, tmp_path)
    assert eos_token_ids(*load_policy(str(tmp_path), CPU, 32)) == expected


def test_eos_without_a_generation_config(tiny_policy, tiny_tokenizer):
    """A model without a generation config still ends with its tokenizer's EOS."""
    tiny_policy.generation_config = None
    assert eos_token_ids(tiny_policy, tiny_tokenizer) == [tiny_tokenizer.eos_token_id]


def test_a_missing_pad_token_becomes_eos(tmp_path, tiny_policy):
    """T4: a tokenizer without a pad token pads with EOS; every mask goes by position, so nothing is lost."""
    save_model(tiny_policy, word_tokenizer(eos_token="w1"), tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


@pytest.mark.parametrize("special, fragment", [({}, "neither a pad nor an EOS"), ({"pad_token": "w1"}, "no EOS token")])
def test_a_policy_needs_an_eos_token(tmp_path, tiny_policy, special, fragment):
    """A tokenizer without EOS could never end an answer: the message names the folder and the file to mend."""
    save_model(tiny_policy, word_tokenizer(**special), tmp_path)
    with pytest.raises(UserError, match=fragment) as error:
        load_policy(str(tmp_path), CPU, 32)
    assert str(error.value).startswith(str(tmp_path))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, tiny_policy):
    """A tokenizer with more tokens than the model embeds belongs to another model; a smaller one is fine."""
    save_model(tiny_policy, word_tokenizer(301, eos_token="w0"), tmp_path)
    with pytest.raises(UserError, match="301 tokens, its model embeds 300"):
        load_policy(str(tmp_path), CPU, 32)
    word_tokenizer(299, eos_token="w0").save_pretrained(tmp_path)
    assert len(load_policy(str(tmp_path), CPU, 32)[1]) == 299


def test_max_length_beyond_the_context_is_refused(folder, tiny_policy):
    """A sequence longer than the model has positions for is refused with both numbers; the full context is fine."""
    assert context_length(tiny_policy) == 64
    assert context_length(SimpleNamespace(config=GPTBigCodeConfig(n_positions=32))) == 32  # under another name
    with pytest.raises(UserError, match="reads at most 64 tokens; lower --max-length 65"):
        load_policy(folder, CPU, 65)
    load_policy(folder, CPU, 64)


def test_a_reward_model_is_no_policy(tmp_path, tiny_policy, tiny_tokenizer):
    """A classifier's folder given as --policy is refused: transformers would read its backbone as a language model."""
    save_model(GPT2ForSequenceClassification(tiny_policy.config), tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_policy(str(tmp_path), CPU, 32)
