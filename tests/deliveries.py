# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
The contract of TTT's state: the same tokens give the same outputs and final state, whatever the way they arrive.

    python tests/deliveries.py --count 10000

draws deliveries (chunks, padding, packed sequences, in any layout in memory; between them rows are selected, repeated
and rewound) and compares each row with one plain call of its tokens. It stops at the first that differs, whose number
`--first` begins with.
"""

import argparse
import random
import time
from collections import Counter
from dataclasses import fields

import torch

from ttt_omni import TTTLinearState, TTTMLPState, ttt_linear, ttt_mlp


OPS = {"linear": (ttt_linear, TTTLinearState), "mlp": (ttt_mlp, TTTMLPState)}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of |x - y| / (1 + |y|)
ROUNDING = {torch.bfloat16: 2**-7}  # of outputs: float32 rounded once, where the last bit may differ


class Row:
    """A row of the state as it should be: the tokens that it has seen, and what was output for them."""

    def __init__(self, tokens: list[torch.Tensor], outputs: torch.Tensor, broken: int | None = None):
        self.tokens = tokens  # q, k, v [H, t, D], lr [H, t]
        self.outputs = outputs  # [H, t, D], NaN where unknown
        self.broken = broken  # index of the first token that was delivered as NaN

    def __len__(self) -> int:
        return self.outputs.shape[1]

    def copy(self) -> "Row":
        return Row(list(self.tokens), self.outputs, self.broken)

    def rewind(self, length: int) -> None:
        end = len(self) - length
        self.tokens, self.outputs = [x[:, :end] for x in self.tokens], self.outputs[:, :end]
        if self.broken is not None and self.broken >= end:
            self.broken = None


class Delivery:
    """
    Calls of an op drawn at random.

    Attributes:
        log: what was done, in words.
        counts: how often.
        worst: the largest difference so far, by what differs.
    """

    def __init__(self, draw: random.Random):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw.randrange(2**31))
        self.counts, self.worst = Counter(), Counter()
        ttt_type = draw.choice(sorted(OPS))
        self.op, self.state_class = OPS[ttt_type]
        self.dtype = draw.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
        self.state_dtype = torch.promote_types(self.dtype, torch.float32)
        self.gradients = self.dtype == torch.float64 and self.chance(0.3)
        self.m, self.H, self.D = draw.randint(1, 7), draw.randint(1, 2), draw.randint(4, 8)
        m, H, D, F = self.m, self.H, self.D, 4 * self.D

        shapes = {"linear": [(D, D), (1, D)], "mlp": [(D, F), (1, F), (F, D), (1, D)]}[ttt_type]
        scale = (1 / torch.arange(1, m + 1)).clamp(min=m**-0.5) * (1 + 0.2 * self.randn(m))
        self.leaves, self.padding = [], []
        self.parameters = [
            self.leaf(x, self.state_dtype) for x in (scale, 1 + 0.1 * self.randn(H, D), 0.1 * self.randn(H, D))
        ]
        self.initial = [self.leaf(0.2 * self.randn(H, *shape), self.state_dtype) for shape in shapes]
        self.rows = [
            Row(self.new_tokens(0), self.randn(H, 0, D).to(self.dtype)) for _ in range(draw.choice([1, 1, 2, 3, 4]))
        ]
        self.state = self.state_class.initial(*self.initial, batch_size=len(self.rows))
        self.log = [f"{ttt_type} {self.dtype} m={m} H={H} D={D} B={len(self.rows)} gradients={self.gradients}"]

    def check(self) -> None:
        """
        Deliver, and compare.

        Raises:
            AssertionError: something differs.
        """
        for _ in range(self.draw.randint(1, 4)):
            self.deliver()
            change = self.draw.choice([None, self.select, self.repeat, self.rewind, self.rewind_each])
            if change is not None:
                self.counts[change.__name__] += 1
                change()
                self.log.append(f"{change.__name__}: {[len(row) for row in self.rows]} tokens")
        self.compare()

    def chance(self, probability):
        return self.draw.random() < probability

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def leaf(self, x, dtype):
        x = x.to(dtype).requires_grad_(self.gradients)
        self.leaves.append(x)
        return x

    def new_tokens(self, length):
        lr = torch.sigmoid(self.randn(self.H, length)) / self.D * (self.randn(self.H, length) > -1.5)  # a few are 0
        tensors = [*(self.randn(self.H, length, self.D) for _ in range(3)), lr]
        return [self.leaf(x, self.dtype) for x in tensors]

    def layout(self, x):
        """`x` in some layout in memory."""
        kind = self.draw.choice(["as it is", "transposed", "strided", "offset", "expanded"])
        if kind == "transposed" and x.ndim > 1:
            return x.mT.contiguous().mT
        if kind == "strided":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if kind == "offset":
            return torch.cat([x[:1], x])[1:]
        if kind == "expanded" and x.numel() and not x.requires_grad and (x == x[:1]).all():
            return x[:1].expand(x.shape)
        return x

    def length(self):
        """Mini-batches filled to the brim are where mistakes are."""
        m = self.m
        return self.draw.choice([0, 1, 1, m, 2 * m, m - 1, m + 1, self.draw.randint(0, 3 * m)])

    def deliver(self):
        way = self.draw.choice(["plain", "padded", "padded", "packed"])
        self.counts[way] += 1
        if way == "packed":
            lengths = [self.length() for _ in self.rows]
            self.log.append(f"packed: {lengths}")
            self.deliver_packed(lengths)
            return
        total = self.length()
        mask = torch.ones(len(self.rows), total, dtype=torch.bool)
        if way == "padded":
            for row, columns in zip(self.rows, mask):
                self.pad(columns, pending=len(row) % self.m)
        with_mask = way == "padded" or self.chance(0.2)
        self.log.append(f"{way}: {mask.int().tolist()}")
        self.deliver_batch(mask, with_mask)

    def pad(self, row, pending):
        """Padding on the left, on the right, or between the tokens of a row of a mask."""
        total = row.shape[0]
        padding = min(self.draw.choice([0, 1, pending, self.draw.randint(0, total)]), total)
        side = self.draw.choice(["left", "right", "between"])
        if side == "left":
            row[:padding] = False
        elif side == "right":
            row[total - padding :] = False
        else:
            row[self.draw.sample(range(total), padding)] = False

    def deliver_batch(self, mask, with_mask):
        tokens = self.anything(*mask.shape)
        new = self.next_tokens(mask.sum(1).tolist())
        index = mask.nonzero(as_tuple=True)  # in the order of rows
        tokens = [
            x.transpose(1, 2).index_put(index, torch.cat(values, dim=1).transpose(0, 1)).transpose(1, 2)
            for x, values in zip(tokens, zip(*new))
        ]
        mask_of_call = mask.to(self.draw.choice([torch.bool, torch.long, torch.int32, torch.float32]))
        if self.m > 1 and mask.shape[1] and mask.shape[1] % self.m == 0:
            one_before_padding = all(len(row) % self.m == 1 for row in self.rows) and not mask[:, 0].any()
            self.counts["one pending token, then padding"] += bool(one_before_padding and mask[:, 1:].all())
        outputs = []
        for columns in torch.arange(mask.shape[1]).split(self.cut(mask.shape[1])):
            masks = {"attention_mask": self.layout(mask_of_call[:, columns])} if with_mask else {}
            outputs.append(self.call([x[:, :, columns] for x in tokens], **masks))
        o = torch.cat(outputs, dim=2).transpose(1, 2)  # [B, T, H, D]
        assert not o[~mask].any(), "the output of padding is not 0"
        self.receive(new, [x.transpose(0, 1) for x in o[mask].split(mask.sum(1).tolist())])

    def deliver_packed(self, lengths):
        new = self.next_tokens(lengths)
        tokens = [torch.cat(values, dim=1)[None] for values in zip(*new)]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(self.draw.choice([torch.long, torch.int32]))
        o = self.call(tokens, cu_seqlens=self.layout(bounds))
        self.receive(new, o[0].split(lengths, dim=1))

    def anything(self, batch_size, length):
        """What padding may hold: `[B, H, T, D]` three times, and `[B, H, T]`."""
        value = self.draw.choice([None, None, torch.nan, torch.inf])
        tensors = [self.randn(batch_size, self.H, length, self.D).to(self.dtype) for _ in range(4)]
        tensors[3] = tensors[3][..., 0]
        if value is not None:
            tensors = [torch.full_like(x, value) for x in tensors]
        tensors = [x.requires_grad_(self.gradients) for x in tensors]
        self.padding += tensors
        return tensors

    def next_tokens(self, lengths):
        """New tokens for each row. Those of one row may be NaN from some token on."""
        new = [self.new_tokens(length) for length in lengths]
        row = self.draw.randrange(len(lengths))
        if lengths[row] and not self.gradients and self.chance(0.15):
            first = self.draw.randrange(lengths[row])
            for x in new[row]:
                x[:, first:] = torch.nan
            self.counts["broken"] += 1
            self.log.append(f"row {row} gets NaN from its {first}th token on")
            if self.rows[row].broken is None:
                self.rows[row].broken = len(self.rows[row]) + first
        return new

    def receive(self, new, outputs):
        for row, tokens, o in zip(self.rows, new, outputs):
            if row.broken is None:
                assert o.isfinite().all(), "NaN from elsewhere"
            else:  # also before its NaN, which a product with 0 carries to the rest of its mini-batch
                o = torch.full_like(o, torch.nan)
            row.tokens = [torch.cat(pair, dim=1) for pair in zip(row.tokens, tokens)]
            row.outputs = torch.cat([row.outputs, o], dim=1)

    def cut(self, length):
        """Lengths of the chunks that `length` columns arrive in."""
        if length and self.chance(0.2):
            return [1] * length
        cuts = sorted(self.draw.randint(0, length) for _ in range(self.draw.choice([0, 0, 1, 2])))
        return [b - a for a, b in zip([0, *cuts], [*cuts, length])]

    def call(self, tokens, **masks):
        """Also: the state that an op gets stays what it is."""
        inplace = not self.gradients and self.chance(0.3)
        given = self.state.clone() if inplace else self.state.map(self.layout)
        o, state = self.op(
            *map(self.layout, (*tokens, *self.parameters)),
            given,
            **masks,
            checkpoint_group_size=self.draw.randint(0, 3) if self.gradients else 0,
            inplace=inplace,
        )
        if not inplace:
            for field in fields(given):
                before, after = getattr(self.state, field.name), getattr(given, field.name)
                assert torch.equal(before.nan_to_num(7), after.nan_to_num(7)), f"`{field.name}` was changed"
        assert o.dtype == self.dtype
        self.state = state
        self.counts["calls"] += 1
        self.counts["tokens"] += o.shape[0] * o.shape[2]
        return o

    def select(self):
        if self.chance(0.3):
            indices = torch.tensor([self.chance(0.7) for _ in self.rows])
            indices[self.draw.randrange(len(self.rows))] = True
            kept = indices.nonzero().flatten().tolist()
        else:
            kept = [self.draw.randrange(len(self.rows)) for _ in range(self.draw.randint(1, 4))]
            indices = torch.tensor(kept)
        self.state = self.state.select(indices)
        self.rows = [self.rows[i].copy() for i in kept]

    def repeat(self):
        repeats = self.draw.randint(1, 2)
        self.state = self.state.repeat_interleave(repeats)
        self.rows = [row.copy() for row in self.rows for _ in range(repeats)]

    def rewind(self):
        length = self.draw.randint(0, min(len(row) % self.m for row in self.rows))
        self.state = self.state.rewind(length)
        for row in self.rows:
            row.rewind(length)

    def rewind_each(self):
        lengths = [self.draw.randint(0, len(row) % self.m) for row in self.rows]
        self.state = self.state.rewind(torch.tensor(lengths))
        for row, length in zip(self.rows, lengths):
            row.rewind(length)

    def compare(self):
        assert self.state.position.tolist() == [len(row) % self.m for row in self.rows], "positions differ"
        loss, expected_loss = 0, 0
        for number, row in enumerate(self.rows):
            if row.broken is not None:
                continue
            self.counts["rows"] += 1
            initial = self.state_class.initial(*self.initial, batch_size=1)
            expected_o, expected = self.op(*(x[None] for x in row.tokens), *self.parameters, initial)
            known = ~row.outputs.isnan()
            self.differ("output", row.outputs[known], expected_o[0][known], ROUNDING.get(self.dtype))
            pairs = [(row.outputs, expected_o[0])]
            for field in fields(expected):
                if field.name != "position":
                    x, y = getattr(self.state, field.name)[number], getattr(expected, field.name)[0]
                    y = y if x.shape == y.shape else y.new_zeros(x.shape)  # no token, and so no pending rows yet
                    self.differ(f"state.{field.name}", x, y)
                    pairs.append((x, y))
            if self.gradients:
                weights = [self.randn(*x.shape) for x, _ in pairs]
                loss += sum((weight * x).sum() for weight, (x, _) in zip(weights, pairs))
                expected_loss += sum((weight * y).sum() for weight, (_, y) in zip(weights, pairs))
        if self.gradients:
            self.counts["gradients"] += 1
            gradients = torch.autograd.grad(loss, self.leaves + self.padding, allow_unused=True)
            for gradient in gradients[len(self.leaves) :]:
                assert gradient is None or not gradient.any(), "the gradient of padding is not 0"
            expected = torch.autograd.grad(expected_loss, self.leaves, allow_unused=True)
            for x, y, leaf in zip(gradients, expected, self.leaves):
                x, y = (torch.zeros_like(leaf) if g is None else g for g in (x, y))
                self.differ("gradient", x, y)

    def differ(self, name, x, y, tolerance=None):
        if x.numel():
            x, y = x.detach().to(self.state_dtype), y.detach().to(self.state_dtype)
            difference = float(((x - y).abs() / (1 + y.abs())).max())
            assert difference <= (tolerance or TOLERANCE[self.state_dtype]), f"{name} differs by {difference:.1e}"
            kind = f"{name.split('.')[0]} in {str(self.dtype).removeprefix('torch.')}"
            self.worst[kind] = max(self.worst[kind], difference)


def main() -> None:
    """Draw, check and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="deliveries to draw (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them, its seed (default: 0)")
    args = parser.parse_args()

    counts, worst, started = Counter(), Counter(), time.monotonic()
    for number in range(args.first, args.first + args.count):
        delivery = Delivery(random.Random(number))
        try:
            delivery.check()
        except Exception as error:
            error.add_note("\n".join([f"Delivery {number}:", *delivery.log]))
            raise
        counts += delivery.counts
        worst |= delivery.worst
    print(f"{args.count} deliveries in {time.monotonic() - started:.0f} s: nothing differs")
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    for name, difference in sorted(worst.items()):
        print(f"largest difference of {name}: {difference:.1e}")


if __name__ == "__main__":
    main()
