"""vLLM, in its CPU build: it loads the export and gives the same log-probabilities as transformers."""

from __future__ import annotations

import torch
from folders import folders, proved
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

TOKENS = list(range(3, 35))


def main() -> None:
    """Compute log-probabilities with both, and compare."""
    args = folders(__doc__)
    reference = AutoModelForCausalLM.from_pretrained(args.expanded, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    model = LLM(str(args.expanded), dtype="float32", enforce_eager=True, max_model_len=64)
    [done] = model.generate(TokensPrompt(prompt_token_ids=TOKENS), SamplingParams(max_tokens=1, prompt_logprobs=0))
    got = [entry[token].logprob for token, entry in zip(TOKENS[1:], done.prompt_logprobs[1:], strict=True)]
    wanted = [expected[place, token].item() for place, token in enumerate(TOKENS[1:])]
    difference = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert difference < 1e-3, difference
    proved(f"log-probabilities of {len(got)} tokens differ from transformers' by {difference:.1g} at most")


if __name__ == "__main__":
    main()
