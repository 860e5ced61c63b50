"""Are the tests worth anything? Break the package in one place at a time and see that some test notices.

    python tests/mutants.py [part of a file name, e.g. warp]

Each mutant is one sign, index, comparison or factor, in a temporary copy of the repository. Exit code 1 where one
survives, or where the text to replace does not stand in its file exactly once. Takes a few minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    ("warp", "return (1.0 - lam) * a + lam * b", "return lam * a + (1.0 - lam) * b"),
    ("warp", "if math.pi - omega < 1e-4:", "if False:"),
    ("warp", "(math.sin((1.0 - lam) * omega) * a", "(math.sin(lam * omega) * a"),
    ("warp", "+ math.sin(lam * omega) * b) /", "- math.sin(lam * omega) * b) /"),
    ("warp", "* b) / math.sin(omega)", "* b) / math.cos(omega)"),
    ("warp", r".*?\.\d+(?=\.)", r".*?\.\d(?=.)"),
    ("warp", 'def merge(init, policies, by="block")', 'def merge(init, policies, by="tensor")'),
    ("warp", "slerp(acc, delta, 1.0 / m)", "slerp(acc, delta, 0.5)"),
    ("warp", "slerp(acc, delta, 1.0 / m)", "slerp(delta, acc, 1.0 / m)"),
    ("warp", "(policy[name] - init[name]).flatten()", "(init[name] - policy[name]).flatten()"),
    ("warp", "init[name] + piece.view_as(init[name])", "init[name] - piece.view_as(init[name])"),
    ("warp", "if norm_1 and norm_2:", "if norm_1 or norm_2:"),
    ("warp", "ratios.append(norm_1 / norm_2)", "ratios.append(norm_2 / norm_1)"),
    ("rollout", "self.tokens[:, -self.mask.shape[1] :]", "self.tokens[:, : self.mask.shape[1]]"),
    ("data", "columns >= width - lengths", "columns > width - lengths"),
    ("data", "columns < lengths if side", "columns <= lengths if side"),
    ("rollout", 'side="left"', 'side="right"'),
    ("rollout", "(attention_mask.cumsum(-1) - 1).clamp(min=0)", "attention_mask.cumsum(-1)"),
    ("rollout", "is_eos.cumsum(-1) - is_eos.long()", "is_eos.cumsum(-1)"),
    ("rollout", "cumulated[:, -1:], right=True)", "cumulated[:, -1:], right=False)"),
    ("rollout", "input_ids=inputs, attention_mask=attention_mask", "input_ids=inputs, attention_mask=None"),
    ("rollout", "uniform[:, t : t + 1] * cumulated[:, -1:]", "uniform[:, t : t + 1]"),
    ("rollout", "token = token.masked_fill(ended[:, None], pad_token_id)", "pass"),
    ("rollout", "position_ids=positions(attention_mask)[:, -inputs.shape[1] :]", "position_ids=None"),
    ("rollout", "if ended.all():", "if ended.any():"),
    ("rollout", '"position_ids": positions(rollout.attention_mask),', ""),
    ("rollout", '"attention_mask": rollout.attention_mask,', ""),
    ("rollout", "output.logits[:, :-1].float() / temperature", "output.logits[:, :-1].float()"),
    ("rollout", "output.logits[:, :-1].float() / temperature", "output.logits[:, :-1].float().div_(temperature)"),
    ("rollout", "output.logits[:, :-1].float() / temperature", "output.logits[:, :-1] / temperature"),
    ("rollout", "model(**inputs) if weights is None", "model(**inputs) if True"),
    ("rollout", "row[start:end], skip_special_tokens=True)", "row[start:], skip_special_tokens=True)"),
    ("rollout", "row[start:end], skip_special_tokens=True)", "row[start:end], skip_special_tokens=False)"),
    ("rollout", "[len(prompt) :]", "[len(prompt) + 1 :]"),
]


def passes(folder, test):
    """Whether a test file passes; anything but passed and failed (a mutant that does not even import) is an error."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{test}.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def main():
    mutants = [m for m in MUTANTS if any(part in m[0] for part in sys.argv[1:] or [""])]
    killed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        leave = shutil.ignore_patterns(".*", "data", "runs", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=leave)
        for test in [*sorted({m[0] for m in mutants}), "enumeration"]:
            if not passes(folder, test):
                raise SystemExit(f"tests/test_{test}.py fails without any mutant")
        for module, old, new in mutants:
            path = folder / "rlhf_min" / f"{module}.py"
            text = path.read_text(encoding="utf-8")
            if text.count(old) != 1:
                print(f"NOT ONCE   {module}: {old}")
                continue
            path.write_text(text.replace(old, new), encoding="utf-8")
            survived = passes(folder, module) and passes(folder, "enumeration")
            path.write_text(text, encoding="utf-8")
            killed += not survived
            print(f"{'SURVIVED' if survived else 'killed  '}   {module}: {old!r} → {new!r}", flush=True)
    print(f"{killed} of {len(mutants)} mutants killed")
    return int(killed < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
