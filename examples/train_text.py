"""Text: a small transformer predicts the topic of a passage, or the punctuation after each word, with MixUp.

    python examples/train_text.py

The text is the help that comes with Python: passages of 5 to 30 words from its eight longest topics, half of them to
train and half to test. One task has a label per passage, its topic. The other has a label per word, of shape
``(B, T)``: which punctuation mark followed it before all were removed (none, comma, full stop, another), and IGNORE on
the padding.

Words cannot be mixed, their embeddings can: :class:`MixUp` stands after the embedding. A mixed passage is as long as
the longer of its two, and so is its padding mask.

Prints the test scores after the last epoch, without and with MixUp.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import product
from pydoc_data.topics import topics

import torch
from common import Runs, Samples, evaluate, example_parser, fit, report
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mixup_nn import MixUp, MixUpCriterion

PAD, RARE, IGNORE = 0, 1, -100  # two special tokens, and the label of padding
LONGEST, TOPICS = 30, 8
MARKS = {"": 0, ",": 1, ".": 2}  # what follows a word; anything else is 3


def load_passages(device: torch.device) -> dict[str, tuple[Samples, Samples]]:
    """The two tasks, each as passages to train and to test: tokens ``(N, T)``, labels ``(N,)`` or ``(N, T)``."""
    generator = torch.Generator().manual_seed(0)
    passages = []
    for topic, name in enumerate(sorted(topics, key=lambda name: -len(topics[name]))[:TOPICS]):
        words = re.findall(r"([^\W\d_]+)([^\w\s]?)", topics[name].lower())
        while words:
            length = int(torch.randint(5, LONGEST + 1, (), generator=generator))
            passages.append((words[:length], topic))
            words = words[length:]
    order = torch.randperm(len(passages), generator=generator).tolist()
    parts = order[::2], order[1::2]

    counts = Counter(word for number in parts[0] for word, _ in passages[number][0])
    known = [word for word, count in counts.items() if count > 1]
    token = {word: number for number, word in enumerate(known, start=RARE + 1)}

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    tasks: dict[str, list[Samples]] = {"topic of a passage": [], "mark after a word": []}
    for part in parts:
        texts = [passages[number][0] for number in part]
        tokens = padded([[token.get(word, RARE) for word, _ in text] for text in texts], PAD)
        marks = padded([[MARKS.get(mark, 3) for _, mark in text] for text in texts], IGNORE)
        labels = torch.tensor([passages[number][1] for number in part], device=device)
        tasks["topic of a passage"].append(Samples(tokens, labels))
        tasks["mark after a word"].append(Samples(tokens, marks))
    return {task: (train, test) for task, (train, test) in tasks.items()}


class Transformer(nn.Module):
    """One layer over mixed embeddings; logits ``(B, C, T)`` of each word, or ``(B, C)`` of their mean."""

    def __init__(self, mixup: MixUp, words: int, classes: int, *, per_word: bool, width: int = 64) -> None:
        super().__init__()
        self.mixup = mixup
        self.per_word = per_word
        self.embedding = nn.Embedding(words, width, padding_idx=PAD)
        self.position = nn.Parameter(0.1 * torch.randn(LONGEST, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits; those of a mixed batch while the mixer is in training mode."""
        valid = (tokens != PAD).float()
        embedded = self.mixup(self.embedding(tokens))
        if self.mixup.training:
            valid = self.mixup(valid, self.mixup.last_mix)  # the same mix: above 0 where either passage has a word
        hidden = self.encoder(embedded + self.position, src_key_padding_mask=valid == 0)
        if self.per_word:
            return rearrange(self.head(hidden), "b t classes -> b classes t")
        shown = (valid > 0).float()[..., None]
        return self.head((hidden * shown).sum(1) / shown.sum(1))


def main() -> None:
    """Train every pair of runs, then print the results."""
    args = example_parser(__doc__, alpha=0.4, epochs=8, batch_size=50).parse_args()
    torch.set_num_threads(1)  # so small a net gains little from more
    tasks = load_passages(args.device)
    alphas = {"without MixUp": 0.0, "with MixUp": args.alpha}
    runs: Runs = {task: {name: [] for name in alphas} for task in tasks}
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "compile": args.compile}
    settings = list(product(tasks.items(), range(args.seeds), alphas.items()))
    for (task, (train, test)), seed, (name, alpha) in tqdm(settings, unit="run"):
        torch.manual_seed(seed)
        mixup, words, classes = MixUp(alpha), int(train.input.max()) + 1, int(train.target.max()) + 1
        model = Transformer(mixup, words, classes, per_word=train.target.ndim == 2).to(args.device)
        criterion = MixUpCriterion(nn.CrossEntropyLoss(ignore_index=IGNORE), mixup)
        fit(model, criterion, train, lr=3e-3, seed=seed, **options)
        runs[task][name].append([evaluate(model, test)])
    print(report(runs))


if __name__ == "__main__":
    main()
