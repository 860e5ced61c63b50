"""Are the tests worth anything? Break the package in one place at a time and see that some test notices.

    python tests/mutants.py [part of a file name, e.g. warp]

Each mutant is one sign, index, comparison or factor, in a temporary copy of the repository. Exit code 1 where one
survives, or where the text to replace does not stand in its file exactly once. Takes a few minutes.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel  # noqa: F401

# imported here, once: every run of pytest is a fork of this process

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = [
    ("losses", "chosen - rejected if margin is None", "rejected - chosen if margin is None"),
    ("losses", "chosen - rejected - margin", "chosen - rejected + margin"),
    ("losses", "(chosen + rejected) ** 2", "(chosen - rejected) ** 2"),
    ("losses", "F.logsigmoid(difference)", "F.sigmoid(difference).log()"),
    ("losses", "or tensor.shape != chosen.shape", ""),
    ("reinforce", "(reward - beta * kl).detach()", "(reward + beta * kl).detach()"),
    ("reinforce", "(reward - beta * kl).detach()", "reward.sub_(beta * kl).detach()"),
    ("reinforce", "(reward - beta * kl).detach()", "reward - beta * kl"),
    ("reinforce", "self.count += rewards.numel()", "self.count += 1"),
    ("reinforce", "(logprobs - ref_logprobs).masked_fill(", "(ref_logprobs - logprobs).masked_fill("),
    ("reinforce", "(logprobs - ref_logprobs).masked_fill(~mask, 0.0).sum(-1)", "(logprobs - ref_logprobs).sum(-1)"),
    ("reinforce", "return d**2 / 2", "return d**2"),
    ("reinforce", "torch.expm1(-d) + d", "torch.expm1(d) - d"),
    ("reinforce", "(logp.exp() * (logp - ref_logp))", "(ref_logp.exp() * (ref_logp - logp))"),
    ("reinforce", ".sum(-1).masked_fill(~mask, 0.0).sum(-1)", ".sum(-1).sum(-1)"),
    ("reinforce", "answer_logprob = logprobs.masked_fill(~mask, 0.0).sum(-1)", "answer_logprob = logprobs.sum(-1)"),
    ("reinforce", "-(advantage.detach() * answer_logprob).mean()", "(advantage.detach() * answer_logprob).mean()"),
    ("reinforce", "-(advantage.detach() * answer_logprob).mean()", "-(advantage.detach() * answer_logprob).sum()"),
    ("reinforce", "advantage.shape != logprobs.shape[:1]", "advantage.numel() != len(logprobs)"),
    ("warp", "policy[name].detach().to(dtype), mu)", "policy[name].detach().to(dtype), 1 - mu)"),
    ("warp", "torch.promote_types(old.dtype, torch.float32)", "old.dtype"),
    ("warp", "policy[name].detach()", "policy[name]"),
    ("warp", "torch.lerp(start[name], end[name], weight)", "torch.lerp(end[name], start[name], weight)"),
    ("warp", "(u - v).norm().item(), (u + v).norm().item()", "(u + v).norm().item(), (u - v).norm().item()"),
    ("warp", "a, b = a.double(), b.double()", "pass"),
    ("warp", "if omega < 1e-4:", "if omega < 1e-1:"),
    ("warp", "return 1.0 - lam, lam", "return lam, 1.0 - lam"),
    ("warp", "return keep * a + take * b", "return keep * a - take * b"),
    ("warp", "if math.pi - omega < 1e-2:", "if False:"),
    ("warp", "return math.sin((1.0 - lam) * omega)", "return math.sin(lam * omega)"),
    ("warp", "math.sin(lam * omega) / math.sin(omega)", "math.sin(lam * omega) / math.cos(omega)"),
    ("warp", r".*?\.\d+(?=\.)", r".*?\.\d(?=.)"),
    ("warp", 'def merge(init, policies, by="block")', 'def merge(init, policies, by="tensor")'),
    ("warp", "1.0 / (m + 1))", "0.5)"),
    ("warp", "c = [keep * c[i] for i in range(m)] + [take]", "c = [take * c[i] for i in range(m)] + [keep]"),
    ("warp", "gram[m][m], products[m])", "gram[m][m], gram[m - 1][m])"),
    ("warp", "square_a * square_b - product**2", "square_a * square_b"),
    ("warp", "end.double() - start for", "end.double() for"),
    ("warp", "torch.sub(end, start, out=delta)", "torch.sub(start, end, out=delta) if end is ends[0] else end"),
    ("warp", "torch.stack(products).sum(0)", "products[-1]"),
    ("warp", "gram + gram.tril(-1).T", "gram"),
    ("warp", "out.add_(end, alpha=c)", "out.add_(end)"),
    ("warp", "torch.mul(start, 1.0 - sum(coefficients), out=out)", "torch.mul(start, 1.0, out=out)"),
    ("warp", "if square_1 and square_2:", "if square_1 or square_2:"),
    ("warp", "math.sqrt(square_1 / square_2)", "math.sqrt(square_2 / square_1)"),
    ("rollout", "self.tokens[:, -self.mask.shape[1] :]", "self.tokens[:, : self.mask.shape[1]]"),
    ("batches", "columns >= width - lengths", "columns > width - lengths"),
    ("batches", "columns < lengths if side", "columns <= lengths if side"),
    ("rollout", 'side="left"', 'side="right"'),
    ("parallel", "flat / self.size", "flat"),
    ("parallel", "self.index * count : (self.index + 1) * count", "self.index : self.index + count"),
    ("parallel", "batch_size % (self.size * k)", "batch_size % self.size"),
    ("parallel", "made[rank() % count]", "made[rank() // count]"),
    ("reinforce", "means[\"entropy\"] /= means", "means[\"entropy\"] *= means"),
    ("reward_model", "device=model.device).argsort()]", "device=model.device)]"),
    ("reward_model", "(longest - len(rows[i]))", "(len(rows[i]) - longest)"),
    ("decoding", "(attention_mask.cumsum(-1) - 1).clamp(min=0)", "attention_mask.cumsum(-1)"),
    ("decoding", "torch.where(self.real, 0.0, -torch.inf)", "torch.where(self.real, 0.0, 0.0)"),
    ("decoding", "-torch.inf).triu(1)", "-torch.inf).triu(2)"),
    ("decoding", "weight = weight + layer.delta().detach()", "pass"),
    ("decoding", "            weight = weight.T\n", "            weight = weight.T.T\n"),
    ("decoding", "[tensor[rows] for tensor in tensors]", "[tensor[: rows.sum()] for tensor in tensors]"),
    ("decoding", "self.mask[rows], self.positions[rows]", "self.mask[: rows.sum()], self.positions[: rows.sum()]"),
    ("decoding", "            replace_module(self.model, name, layer)\n", "            pass\n"),
    ("decoding", "self.real[:, : self.length]", "None"),
    ("decoding", "self.keys[layer][:, :, self.slots] = keys", "self.keys[layer][:, :, self.slots] = values"),
    ("rollout", "is_eos.cumsum(-1) - is_eos.long()", "is_eos.cumsum(-1)"),
    ("rollout", "torch.searchsorted(cumulated, target, right=True)", "torch.searchsorted(cumulated, target)"),
    ("rollout", "torch.searchsorted(inner, target, right=True)", "torch.searchsorted(inner, target)"),
    ("rollout", "uniform * cumulated[:, -1:]", "uniform"),
    ("rollout", "cumulated.take_along_dim(block, 1) + inner[:, -1:]", "cumulated.take_along_dim(block, 1)"),
    ("rollout", "draw(probs, uniform[rows, t : t + 1])", "draw(probs, uniform[: len(rows), t : t + 1])"),
    ("rollout", "completions = completions.masked_fill(~mask, pad_token_id)", "pass"),
    ("rollout", "if not going.any():", "if not going.all():"),
    ("rollout", "rows[going], token[going], going[going]", "rows[going], token[: going.sum()], going[going]"),
    ("rollout", "(z.float() / ctx.temperature - norm)", "(z.float() - norm)"),
    ("rollout", "mul_(-s[:, None])", "mul_(s[:, None])"),
    ("rollout", "target.clamp(min=0)", "target"),
    ("rollout", "scale = gradient / ctx.temperature", "scale = gradient"),
    ("rollout", '"position_ids": positions(rollout.attention_mask),', ""),
    ("rollout", '"attention_mask": rollout.attention_mask,', ""),
    ("rollout", "_logits(model, rollout, weights).float() / temperature", "_logits(model, rollout, weights).float()"),
    ("rollout", "weights).float() / temperature", "weights).float().div_(temperature)"),
    ("rollout", "tokens[..., None])[..., 0].float() / temp", "tokens[..., None])[..., 0] / temp"),
    ("rollout", "torch.arange(-rollout.mask.shape[1] - 1, -1,", "torch.arange(-rollout.mask.shape[1], 0,"),
    ("rollout", "model(**inputs) if weights is None", "model(**inputs) if True"),
    ("rollout", "row[start:end], skip_special_tokens=True)", "row[start:], skip_special_tokens=True)"),
    ("rollout", "row[start:end], skip_special_tokens=True)", "row[start:end], skip_special_tokens=False)"),
    ("rollout", "[len(prompt) :]", "[len(prompt) + 1 :]"),
    ("losses", "(logp_w[:, 1:] + log_cdf[:, :-1]).logsumexp(-1)", "(logp_w + log_cdf).logsumexp(-1)"),
    ("losses", "(logp_w[:, 1:] + log_cdf[:, :-1]).logsumexp(-1)", "(logp_w[:, :-1] + log_cdf[:, 1:]).logsumexp(-1)"),
    ("losses", "(logp_w[:, 1:] + log_cdf[:, :-1]).logsumexp(-1)",
     "((logp_w[:, 1:] + log_cdf[:, :-1]).exp().sum(-1) + 1e-8).log()"),
    ("losses", "rejected_logits.log_softmax(-1).logcumsumexp(-1)", "rejected_logits.logcumsumexp(-1)"),
    ("losses", "torch.logaddexp(log_cdf[:, :-1], log_cdf[:, 1:])", "torch.logaddexp(log_cdf[:, :-1], log_cdf[:, :-1])"),
    ("losses", "dim=1) - math.log(2)", "dim=1)"),
    ("losses", "loss = -preference_logprob(chosen_logits, rejected_logits, ties)",
     "loss = -preference_logprob(rejected_logits, chosen_logits, ties)"),
    ("losses", "(expected - (count + 1)) ** 2", "(expected - count) ** 2"),
    ("losses", "(chosen_logits)[0] + rating_mean_std", "(chosen_logits)[0] - rating_mean_std"),
    ("losses", "(expected - (count + 1)) ** 2).mean()", "(expected - (count + 1)) ** 2).sum()"),
    ("losses", "torch.arange(1, logits.shape[-1] + 1,", "torch.arange(logits.shape[-1],"),
    ("losses", "(p * (ratings - mean[:, None]) ** 2).sum(-1).sqrt()", "(p @ ratings**2 - mean**2).sqrt()"),
    ("losses", "(p * (ratings - mean[:, None]) ** 2).sum(-1).sqrt()", "(p * (ratings - mean[:, None]) ** 2).sum(-1)"),
    ("losses", "or chosen_logits.shape != rejected_logits.shape", ""),
    ("reinforce", "k / (k - 1) * (rewards", "(rewards"),
    ("reinforce", "(rewards - rewards.mean(-1, keepdim=True))", "(rewards - rewards.mean(0, keepdim=True))"),
    ("reinforce", "rewards.dim() != 2 or rewards.shape[1] < 2", "rewards.dim() != 2 or rewards.shape[1] < 1"),
    ("reinforce", "k = rewards.shape[1]", "k = rewards.shape[0]"),
    ("reinforce", "return 1 / (1 + sigma)", "return 1 / (1 + sigma**2)"),
    ("reward_model", "if logits.shape[-1] == 1:", "if logits.shape[-1] <= 2:"),
    ("reward_model", "torch.zeros_like(logits[:, 0])", "torch.ones_like(logits[:, 0])"),
    ("reward_model", "return rating_mean_std(logits)", "return rating_mean_std(logits)[::-1]"),
    ("reward_model", "logits.squeeze(-1), torch", "logits.squeeze(-1).sigmoid(), torch"),
    ("reward_model", "attention_mask & (tokens != pad_token_id)", "attention_mask"),
    ("reward_model", "attention_mask & (tokens != pad_token_id)", "tokens != pad_token_id"),
    ("reward_model", "(real * torch.arange", "(torch.arange"),
    ("reward_model", "model.eval(), tokenizer, batch_size", "model, tokenizer, batch_size"),
    ("lora", "isinstance(base, Conv1D)\n", "not isinstance(base, Conv1D)\n"),
    ("lora", "self.enabled = alpha / r,", "self.enabled = alpha / r**0.5,"),
    ("lora", "nn.Dropout(dropout), True", "nn.Dropout(0.0), True"),
    ("lora", "        self.train(base.training)\n", ""),
    ("lora", "bound = 1 / math.sqrt(self.lora_A.shape[1])", "bound = math.sqrt(3 / self.lora_A.shape[1])"),
    ("lora", "generator=generator) * 2 * bound - bound", "generator=generator) * 2 * bound"),
    ("lora", "torch.rand(self.lora_A.shape, generator=generator)", "torch.rand(self.lora_A.shape)"),
    ("lora", "        self.lora_B.zero_()\n", ""),
    ("lora", "delta = self.scale * self.lora_B @ self.lora_A", "delta = self.lora_B @ self.lora_A"),
    ("lora", "        if not self.enabled:", "        if False:"),
    ("lora", "h = self.scale * F.linear(", "h = -self.scale * F.linear("),
    ("lora", "h = self.scale * F.linear(", "h = F.linear("),
    ("lora", "        y = F.linear(x,", "        x = self.dropout(x)\n        y = F.linear(x,"),
    ("lora", "parameter.requires_grad_(is_head(name))", "parameter.requires_grad_(False)"),
    ("lora", "nn.Parameter(layer.weight + layer.delta())", "nn.Parameter(layer.weight - layer.delta())"),
    ("lora", "plain.train(layer.training)", "plain"),
    ("lora", "            layer.enabled = True\n", "            pass\n"),
    ("lora", '        layer.weight.copy_(start[f"{name}.weight"])\n', ""),
    ("lora", "delta.T if layer.transposed else delta, full_matrices", "delta, full_matrices"),
    ("lora", "s[:k, None].sqrt() * vh[:k]", "s[:k, None] * vh[:k]"),
    ("lora", "nn.Parameter(b), 1.0", "nn.Parameter(b), layer.scale"),
    ("lora", '{PREFIX}{name}.lora_A.weight"] = layer.lora_A', '{PREFIX}{name}.lora_A.default.weight"] = layer.lora_A'),
    ("lora", "for name, p in model.named_parameters() if is_head(name)}", "for name, p in ()}"),
    ("lora", '"lora_alpha": round(layer.scale * r, 6)', '"lora_alpha": layer.scale'),
    ("lora", '"fan_in_fan_out": layer.transposed', '"fan_in_fan_out": False'),
    ("model_files", '"use_dora", "use_rslora"', '"use_dora"'),
    ("model_files", "not a[0] == b[1] == r", "not a[0] == b[1]"),
    ("model_files", "2 * len(there) >= len(numbers)", "2 * len(there) > len(numbers) + 1"),
    ("lora", "            layer.lora_A.copy_(a)\n", ""),
    ("lora", "        parameters[name].copy_(tensor)\n", ""),
    ("evaluation", "set_weights(policy, interpolate(start, end, high))", "pass"),
    ("evaluation", "low, high = 0.0, 1.0", "low, high = 0.0, 2.0"),
    ("evaluation", "if kl_at(high) <= target:", "if False:"),
    ("evaluation", "error * math.sqrt(len(reference))", "error"),
    ("evaluation", "(mean_se(values)[0] - mean) /", "(mean - mean_se(values)[0]) /"),
    ("evaluation", "with lora_disabled(reference):", "with lora_disabled(policy):"),
    ("batches", 'self.queue = state["queue"]', "pass"),
    ("batches", 'self.generator.set_state(state["generator"])', "pass"),
    ("files", "    except BaseException:\n        _remove(new)\n", "    except BaseException:\n"),
    ("files", "            _sync(part)\n", "            pass\n"),
    ("checkpoint", "device, weights_only=True)\n    except", "device, weights_only=False)\n    except"),
    ("checkpoint", "            target.copy_(value)\n", "            pass\n"),
    ("checkpoint", "            target.load_state_dict(value)\n", "            pass\n"),
    ("checkpoint", "            state[name] = value\n", "            pass\n"),
    ("checkpoint", '        random.setstate(state["python"])\n', ""),
    ("checkpoint", '        numpy.random.set_state(state["numpy"])\n', ""),
    ("checkpoint", '        torch.set_rng_state(state["torch"].cpu())\n', ""),
    ("resume", 'return hashlib.file_digest(file, "sha256").hexdigest()', "return path.name"),
    ("runlog", "        self._lines.truncate(offset)", "        pass"),
    ("runlog", "        self._lines.truncate(offset)", "        offset and self._lines.truncate(offset)"),
    ("runlog", '"metrics_bytes": self._lines.tell(), "processes"', '"metrics_bytes": 0, "processes"'),
    ("resume", "before if in_cache else before | files", "files"),
    ("resume", "before if in_cache else before | files", "before | files"),
    ("resume", 'about.get("format") == FORMAT', "about"),
    ("resume", 'about["processes"] != world_size()', "False"),
    ("resume", "if len(lines) != size:", "if len(lines) < size - 3:"),
    ("resume", "any(about.get", "all(about.get"),
    ("model_files", "if layers and not numbers:", "if False:"),
    ("resume", '.get("run") != run.get("id")', '.get("run") is None'),
    ("resume", "isinstance(about.get(name), kind) for", "name in about for"),
    ("model_files", "if plain not in twice", "if True"),
    ("decoding", 'not getattr(model, "_is_stateful", False)', "True"),
    ("rollout", "logits if logits.shape[1] == len(kept) else logits[:, kept]", "logits"),
    ("runlog", "(self._stop or step == steps or step", "(self._stop or step"),
    ("runlog", "(self._stop or step == steps or step", "(step == steps or step"),
    ("runlog", "range(done + 1, steps + 1)", "range(done or 1, steps + 1)"),
    ("runlog", 'and saved["title"] == title', ""),
    ("resume", "before.get(file) != files.get(file)]", "before.get(file) != files.get(file, before.get(file))]"),
    ("runlog", "self._start -= saved", "self._start += saved"),
    ("runlog", "if not self._in_step or self._stop or", "if self._stop or"),
    ("runlog", "if parallel.from_first(self.writes and path.exists()):", "if False:"),
    ("runlog", '            RandomState().load_state_dict(saved["random"])\n', ""),
    ("runlog", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
]  # fmt: skip
TESTS = {"lora": ["lora"], "model_files": ["lora", "bad_input"], "batches": ["data", "rollout", "resume"],
         "decoding": ["decoding", "rollout"], "parallel": ["parallel"],
         "checkpoint": ["resume", "bad_input"], "resume": ["resume"], "files": ["resume"],
         "runlog": ["resume"]}  # fmt: skip


def passes(folder, test):
    """Whether a test file passes; anything but passed, failed and too slow (e.g. it does not import) is an error."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not processes", f"tests/test_{test}.py"]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1, -signal.SIGALRM):
        raise RuntimeError(f"pytest ended with {code}\n" + (folder / "output.txt").read_text(errors="replace"))
    return code == 0


def survives(mutant):
    """None where the text is not there once, else whether no test notices the mutant; () mutates nothing."""
    module, *replacement = mutant
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "data", "runs", "__pycache__", "*.egg-info"))
        if replacement:
            path = folder / "rlhf_min" / f"{module}.py"
            text = path.read_text(encoding="utf-8")
            if text.count(replacement[0]) != 1:
                return None
            path.write_text(text.replace(*replacement), encoding="utf-8")
        tests = TESTS.get(module, [module, "enumeration"])
        return all(passes(folder, test) for test in tests)


def main():
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    mutants = [m for m in MUTANTS if any(part in m[0] for part in sys.argv[1:] or [""])]
    modules = sorted({m[0] for m in mutants})
    killed = 0
    with multiprocessing.get_context("fork").Pool() as pool:
        for module, sound in zip(modules, pool.imap(survives, [(module,) for module in modules])):
            if not sound:
                raise SystemExit(f"tests/test_{module}.py fails without any mutant")
        for (module, old, new), survived in zip(mutants, pool.imap(survives, mutants)):
            verdict = {None: "NOT ONCE", True: "SURVIVED", False: "killed"}[survived]
            killed += verdict == "killed"
            print(f"{verdict:8}   {module}: {old!r} → {new!r}", flush=True)
    print(f"{killed} of {len(mutants)} mutants killed")
    return int(killed < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
