"""Check your solution of an exercise:  python exercises/check.py N

If it is not right, you read what is wrong and what to think about, but never the answer. Without N, all exercises but
the last one, which trains, are checked.

Exit codes: 0 right; 1 not yet; 2 the command cannot work, e.g. there is no exercise N.
"""

import importlib
import sys
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the scripts, e.g. train_reinforce, are no package

import checks
from compare import NotYet

from rlhf_min.support.errors import UserError, one_line_errors

EXERCISES = {  # N: (file, where the package does the same)
    1: ("ex01_pairwise_loss", "pairwise_loss in rlhf_min/losses.py"),
    2: ("ex02_completion_mask", "completion_mask in rlhf_min/rollout.py"),
    3: ("ex03_answer_logprob", "token_logprobs in rlhf_min/rollout.py"),
    4: ("ex04_reinforce_loss", "policy_gradient_loss in rlhf_min/reinforce.py"),
    5: ("ex05_past_only_baseline", "MovingAverageBaseline in rlhf_min/reinforce.py"),
    6: ("ex06_leave_one_out", "leave_one_out in rlhf_min/reinforce.py"),
    7: ("ex07_kl_estimates", "kl_estimate in rlhf_min/reinforce.py"),
    8: ("ex08_kl_in_the_reward", "shaped_reward in rlhf_min/reinforce.py"),
    9: ("ex09_ordinal_loss", "preference_logprob in rlhf_min/losses.py"),
    10: ("ex10_sigma", "rating_mean_std in rlhf_min/losses.py, sigma_weight in rlhf_min/reinforce.py"),
    11: ("ex11_ema", "ema_update in rlhf_min/warp.py"),
    12: ("ex12_slerp", "angle and slerp in rlhf_min/warp.py"),
    13: ("ex13_merge_three", "merge in rlhf_min/warp.py"),
    14: ("ex14_lora_merge", "LoRALayer.delta and merge_lora in rlhf_min/lora.py"),
    15: ("ex15_find_the_bug", "rlhf_min/, which does these ten things without the bugs"),
    16: ("ex16_stop_the_hack", "the table `What to try next` in README.md, for other ways to more gold"),
}


def verdict(number, module):
    """(right or not, what the learner reads). module: the exercise's file, or anything with the same names."""
    file, solution = EXERCISES[number]
    try:
        said = getattr(checks, f"check_{number}")(module)
    except NotImplementedError as error:
        empty = traceback.extract_tb(error.__traceback__)[-1]
        name = f", {empty.name}" if Path(empty.filename).stem == file else ""
        return False, f"Exercise {number} is still empty. Its task stands in exercises/{file}.py{name}."
    except NotYet as wrong:
        end = "" if str(wrong)[-1] in ".?!" else "."
        return False, f"Exercise {number}, not yet: {wrong}{end}"
    except Exception as error:
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem == file]
        if not lines and isinstance(error, (AttributeError, KeyError, TypeError, ValueError)):
            slip = f"the check could not use your code ({type(error).__name__}: {error})"
            needs = "Names, arguments and what is returned must be those of the docstring"
            return False, f"Exercise {number}, not yet: {slip}. {needs}."
        if not lines:  # a defect of the check, not of the learner's code
            raise
        place = f"line {lines[-1].lineno} of {file}.py, `{lines[-1].line}`"
        return False, f"Exercise {number}, not yet: your code raised {type(error).__name__} in {place}: {error}."
    return True, f"Exercise {number} is right. {said or ''}".rstrip() + f"\nCompare it with {solution}."


def load(number):
    """The exercise's file as a module. UserError where Python cannot read it."""
    file = EXERCISES[number][0]
    try:
        return importlib.import_module(file)
    except (SyntaxError, NameError, ImportError) as error:
        raise UserError(f"exercises/{file}.py cannot be read: {type(error).__name__}, {error}") from None


@one_line_errors
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if len(words) > 1 or not {*words} <= {str(number) for number in EXERCISES}:
        raise UserError(f"there is no exercise {' '.join(words)!r}; run python exercises/check.py N, N from 1 to 16")
    chosen = [int(words[0])] if words else range(1, len(EXERCISES))
    results = [verdict(number, load(number)) for number in chosen]
    for _, text in results:
        print(text)
    raise SystemExit(not all(right for right, _ in results))


if __name__ == "__main__":
    main()
