"""A word-level tokenizer for a task: one token a word, one token a digit.

Numbers are spelled digit by digit, so that arithmetic has to be learned and no answer is a single token.
The decoder joins digits and attaches punctuation, so that text survives encode and decode unchanged.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from benchmarks.recovery import problems, walks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"


def build_tokenizer(task: str = "words") -> PreTrainedTokenizerFast:
    """The tokenizer of "words" or "walks"; it starts every text with `<bos>` and pads on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[0-9]|[.,;?]"), "isolated")]
    )
    words = sorted({word for text in _TEXTS[task]() for word, _ in split.pre_tokenize_str(text)})
    tokens = [PAD, EOS, BOS, UNK, *string.digits, *(word for word in words if word not in string.digits)]
    vocab = {token: i for i, token in enumerate(tokens)}

    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = split
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), ""),
            decoders.Replace(Regex(r" (?=[.,;?])"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
    )


def _words() -> list[str]:
    """Every text a word problem can be made of, slots filled with every word that may stand there."""
    slots = {"P": problems.HE + problems.SHE, "things": problems.THINGS, "containers": problems.CONTAINERS}
    numbers = dict.fromkeys("nbkd", 1)
    rest = {"Q": problems.HE[0], "S": "He", **{name: words[0] for name, words in slots.items()}}
    texts = [template.format(**rest, **numbers) for template in problems.TEMPLATES]
    texts += [word for words in slots.values() for word in words] + ["He", "he", "She", "she"]
    texts += ["+ - * / = ;", problems.STRICT_ENDING.format(answer=1), problems.LOOSE_ENDING.format(answer=1)]
    return texts


def _walks() -> list[str]:
    """The same of the walks."""
    texts = [template.format(x=1, y=1, n=1, d="north") for template in walks.TEMPLATES]
    endings = [ending.format(answer=1) for ending in (problems.STRICT_ENDING, problems.LOOSE_ENDING)]
    return [*texts, *walks.DIRECTIONS, "ahead back left right around = ;", *endings]


_TEXTS = {"words": _words, "walks": _walks}
