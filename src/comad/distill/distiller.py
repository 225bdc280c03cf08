"""The method on one screen: mask, encode, align, fuse, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distill.config import Method
from comad.distill.encoding import StudentSide
from comad.distill.fusion import DropEasiest, Joined, Pair, fuses_targets, join
from comad.distill.health import Evidence, health_metrics
from comad.distill.masking import Masks
from comad.distill.objectives import Term, Which, mean_distance
from comad.distill.relations import Queue, attention_logits, mean_of_maps, token_logits, with_class_token
from comad.distill.taps import Encoded
from comad.distill.teaching import Targets, one_row_per_mask
from comad.models.backbone import Tokens, scatter_patches
from comad.models.timm_backbone import TimmBackbone
from comad.runtime.train import Step


class Distiller(StudentSide):
    """Student, decoders, aligners, statistics: exactly what training changes. Teachers stay outside.

    Args:
        student: the network to train.
        method: the five slots.
        teacher_widths: E of each teacher, where it is read.
        teachers_with_cls: whether each teacher's class token carries meaning.
    """

    def __init__(
        self, student: TimmBackbone, method: Method, teacher_widths: Sequence[int], teachers_with_cls: Sequence[bool]
    ):
        super().__init__(student, method)
        self.num_teachers, one_target = len(teacher_widths), fuses_targets(method.fusion)
        self.teachers_with_cls = tuple(has or method.tap.pooled for has in teachers_with_cls)
        tokens = [term for term in method.active.values() if term.over_tokens]
        self.listened: dict[Which, range] = {
            term.teachers: method.chosen(term.teachers, self.num_teachers) for term in tokens
        }
        self.used = sorted({m for numbers in self.listened.values() for m in numbers})
        widths = [teacher_widths[m] for m in self.used]
        with_cls = [self.teachers_with_cls[m] and any(term.cls for term in tokens) for m in self.used]
        self.normalizers = method.normalize.build(widths)
        self.aligners = method.aligner.build(widths, student.width, with_cls, one_target)
        self.projections = nn.ModuleDict(
            {name: _projection(student.width) for name, term in method.active.items() if term.projection}
        )
        self.queues = nn.ModuleDict(
            {name: self._queues(term, one_target) for name, term in method.active.items() if term.over == "queue"}
        )

    def _queues(self, term: Term, one_target: bool) -> nn.ModuleList:
        widths = [self.aligners.widths[self.used.index(m)] for m in self.listened[term.teachers]]
        return nn.ModuleList([Queue(self.method.queue, width) for width in (widths[:1] if one_target else widths)])

    def forward(self, images: Float[Tensor, "B 3 H W"], targets: Targets) -> Step:
        """One step of arXiv:2508.04816: encode the student's view, align and fuse the teachers, compare."""
        images, targets = one_row_per_mask(images, targets)
        student = self.encode(images, targets.masks)
        pairs, own = self.align(student, targets)
        joined: dict[Which, Joined] = {
            which: join(self.method.fusion, [pairs[m] for m in ms]) for which, ms in self.listened.items()
        }
        visible = targets.masks.student_sees(len(images), self.student.num_patches, images.device)
        loss, parts, shown = sum(own.values(), student.last.new_zeros(())), dict(own), ()
        compared: dict[object, Tensor] = {}
        for name, term in self.method.active.items():
            said = self.said(term, student, targets, joined)
            anywhere = torch.stack([pair.weight > 0 for pair in said]).any(dim=0)
            counts = term.positions(visible, anywhere[:, 1:], anywhere[:, :1])
            said = self.related(name, said, counts)
            counts = counts[:, : said[0].weight.shape[1]]  # over the queue it is the class token alone
            plain = term.over == "channels" and not term.projection  # then only the positions may differ
            same = (term.teachers, term.distance, term.temperature) if plain else name
            if same not in compared:
                compared[same] = torch.stack([term.distances(pair) for pair in said])
            parts[name] = self.mean(term, compared[same], said, counts, targets.masks)
            loss = loss + term.weight * parts[name]
            shown = said if term.over == "channels" else shown
        evidence = self.evidence(student, shown, targets, joined)
        parts = {name: part.detach() for name, part in parts.items()}
        return Step(loss, lambda: parts | health_metrics(evidence))

    def align(self, student: Encoded, targets: Targets) -> tuple[dict[int, Pair], dict[str, Tensor]]:
        """Student and teacher tokens at one width and at their positions, by teacher; and what aligners learn from.

        The weight of a pair says which tokens are to be believed.
        """
        pairs, own = {}, []
        seen = targets.masks.teachers_see(len(student.last), self.student.num_patches, self.device)
        seen = seen | self.method.tap.decoder  # a decoder speaks of every position
        for position, m in enumerate(self.used):
            cls, patches = targets.tokens[m][:2]
            with_cls = self.teachers_with_cls[m]
            tokens = Tokens(
                patches.float().mean(dim=1) if self.method.tap.pooled else cls if with_cls else None, patches
            )
            tokens = self.normalizers(tokens, position)
            own.append(self.aligners.own_loss(tokens.patches, position))
            target = self._placed(tokens, targets.masks.teachers[m], position)
            valid = torch.cat([torch.full_like(seen[m][:, :1], tokens.cls is not None), seen[m]], dim=1)
            pairs[m] = Pair(self.aligners.predict(student, position), target.float(), valid)
        learnt = [loss for loss in own if loss is not None]
        return pairs, {"anchor": torch.stack(learnt).mean()} if learnt else {}

    def _placed(self, tokens: Tokens, visible: Tensor | None, position: int) -> Float[Tensor, "B N1 K"]:
        """Aligned tokens of one teacher at their positions, the class token first; 0 where there is none."""
        patches, count = self.aligners(tokens.patches, position), self.student.num_patches
        first = torch.zeros_like(patches[:, :1])
        if tokens.cls is not None:
            first = self.aligners(tokens.cls.unsqueeze(1), position)
        rows = torch.cat([first, patches], dim=1)
        if visible is None or patches.shape[1] == count:
            return rows
        return scatter_patches(rows, F.pad(visible + 1, (1, 0)), rows.new_zeros(1 + count, rows.shape[2]))

    def said(self, term: Term, student: Encoded, targets: Targets, joined: Mapping[Which, Joined]) -> tuple[Pair, ...]:
        """What a term compares: tokens at the tap, rows of attention or pixels."""
        everywhere = student.last.new_ones(student.last.shape[:2])
        if term.over_tokens:
            return joined[term.teachers].pairs
        if term.over == "pixels":
            assert student.pixels is not None, "pixels are painted where the student has a mask"
            return (Pair(*student.pixels, everywhere),)
        assert student.qkv is not None
        theirs = [targets.qkv[m] for m in self.method.chosen(term.teachers, self.num_teachers)]
        with_cls = student.qkv.cls is not None and all(part.cls is not None for part in theirs)
        sides = [part if with_cls else part._replace(cls=None) for part in (student.qkv, *theirs)]
        ours, *maps = (attention_logits(with_class_token(part), self.num_heads, term.over) for part in sides)
        target = mean_of_maps(maps)
        if not with_cls:  # a row for the class token that does not count
            ours, target = (F.pad(rows, (0, 0, 0, 0, 1, 0)) for rows in (ours, target))
            everywhere[:, 0] = 0
        return (Pair(ours, target, everywhere),)

    def related(self, name: str, said: Sequence[Pair], counts: Bool[Tensor, "B N1"]) -> tuple[Pair, ...]:
        """What a term compares at last: tokens through a projection, or their relations in place of them."""
        over, found = self.method.terms[name].over, []
        for position, (prediction, target, weight) in enumerate(said):
            if name in self.projections:
                project = self.projections[name]
                prediction, target = project(prediction), project(target)
            if over == "tokens":
                prediction, target = token_logits(prediction, counts), token_logits(target, counts)
            elif over == "queue":
                queue = cast(Queue, cast(nn.ModuleList, self.queues[name])[position])
                newest, weight = target[:, 0], weight[:, :1]
                prediction, target = queue(prediction[:, :1]), queue(target[:, :1])
                if self.training:
                    queue.push(newest)
            found.append(Pair(prediction, target, weight))
        return tuple(found)

    def mean(
        self,
        term: Term,
        distances: Float[Tensor, "P B n"],
        said: Sequence[Pair],
        counts: Bool[Tensor, "B N1"],
        masks: Masks,
    ) -> Float[Tensor, ""]:
        """Mean distance over positions; of several teachers as the fusion weighs them."""
        fusion, weights = self.method.fusion, torch.stack([pair.weight for pair in said])
        if isinstance(fusion, DropEasiest) and len(said) > 1:
            counted = weights * counts
            losses = (distances.detach() * counted).sum(dim=2) / counted.sum(dim=2).clamp(min=1)
            assert masks.chance is not None
            chance = masks.chance.T[list(self.method.chosen(term.teachers, self.num_teachers))]
            weights = weights * fusion.keep(losses, counted.any(dim=2), chance).unsqueeze(2)
        return mean_distance(distances, weights, counts)

    @torch.no_grad()
    def evidence(
        self, student: Encoded, shown: Sequence[Pair], targets: Targets, joined: Mapping[Which, Joined]
    ) -> Evidence:
        """Tokens for the health numbers: of the student's last layer, and of all that it is compared with.

        Where only attention or pixels are compared, of the teachers as they are.
        """
        pairs = [*shown] or [pair for part in joined.values() for pair in part.pairs]
        if pairs:
            target = torch.cat([pair.target for pair in pairs], dim=-1)
            valid = torch.stack([pair.weight > 0 for pair in pairs]).all(dim=0)[:, 1:]
        else:
            target = torch.cat([F.layer_norm(p.float(), p.shape[-1:]) for _, p, *_ in targets.tokens], dim=-1)
            target = F.pad(target, (0, 0, 1, 0))
            valid = torch.ones_like(target[:, 1:, 0], dtype=torch.bool)
        if self.decoder is None and self.method.masking.hidden == "drop":
            valid = valid & targets.masks.student_sees(len(valid), valid.shape[1], valid.device)
        shares = student.last.new_full((self.num_teachers, *student.last.shape[:2]), 0.0 if joined else 1.0)
        for which, part in joined.items():
            shares[list(self.method.chosen(which, self.num_teachers))] += part.shares.detach().float()
        shares = shares / shares.sum(dim=0).clamp(min=1)
        return Evidence.take(student.last[:, 1:], target[:, 1:], shares, valid)

    @torch.no_grad()
    def calibrate(self, tokens: Sequence[Tokens]) -> None:
        """Fit normalisers and aligners on tokens of the same positions: (n, E) and (n, k, E), one entry per teacher."""
        chosen = [tokens[m] for m in self.used]
        if self.method.tap.pooled:
            chosen = [part._replace(cls=part.patches.mean(dim=1)) for part in chosen]
        self.normalizers.calibrate(chosen)
        training = self.training
        self.eval()
        self.aligners.calibrate([self.normalizers(part, m).patches.flatten(0, 1) for m, part in enumerate(chosen)])
        self.train(training)

    @property
    def token_types(self) -> tuple[str, ...]:
        """Tokens of the student's last layer that a term trains: the patches, and the class token if one reads it."""
        method, terms = self.method, [term for term in self.method.active.values() if term.over_tokens and term.cls]
        heard = {m for term in terms for m in self.listened[term.teachers]}
        at_end = method.tap.student == 1 and not method.tap.pooled and not method.tap.decoder
        trained = at_end and any(self.teachers_with_cls[m] for m in heard)
        return ("cls", "patch") if trained else ("patch",)

    @property
    def num_heads(self) -> int:
        """Heads of the student's blocks; the same as its teachers' where attention is compared."""
        return cast(Any, self.student.vit.blocks[0]).attn.num_heads

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.pixel_mean.device


def _projection(width: int) -> nn.Module:
    """φ or ψ as a small MLP (arXiv:2508.04816, "Fusion and Distillation Losses")."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
