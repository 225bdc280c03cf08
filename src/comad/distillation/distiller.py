"""The method on one screen: mask, encode, align, fuse, compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.features import StudentOutput, TeacherOutput, block_at, forward_teacher, map_output
from comad.distillation.fusion import Pair
from comad.distillation.health import central_patches, health_metrics, mean_shares
from comad.distillation.masking import HidingPatches, Masks, drop_unused_masks, move, move_patches
from comad.distillation.method import Method, num_heads
from comad.distillation.objectives import FeatureLoss, Objective, Shapes, mean_over
from comad.models.backbone import (
    Backbone,
    Tokens,
    gather_patches,
    map_tokens,
    patchify,
    resample_patches,
    scatter_patches,
)
from comad.models.decoder import MaskedDecoder
from comad.models.teachers import Teacher
from comad.models.timm_backbone import TimmBackbone, any_size
from comad.runtime.processes import rows_of_all, share_of, sum_of_all
from comad.runtime.run import TrainingError

LOGGED_IMAGES = 32
"""Images of a batch whose loss is logged for each teacher where the targets are fused."""


class Distiller(nn.Module):
    """Student, decoders, projectors, statistics: exactly what training changes. Teachers stay outside.

    Args:
        student: the network to train. It takes over the teachers' number of heads where attention is compared
            (arXiv:2301.01296 asks it of the last block; timm's config has one number for all), and blocks that no
            objective reads are frozen, see `freeze_unread`. One that cannot leave out patches sees whole images.
        teachers: the frozen networks that it will learn from; they are read for their shapes and not kept.
        method: what fills the slots; see `comad.METHODS`.

    Raises:
        ValueError: the method does not fit the student and these teachers.

    Example:
        >>> import comad, torch
        >>> student = comad.load_student("vit_tiny_patch16_224", image_size=48, patch_size=8, depth=2)
        >>> teachers = comad.load_teachers(["mae-stamps", "ibot-stamps"], student)
        >>> distiller = comad.Distiller(student, teachers, comad.METHODS["mean"])
        >>> images = torch.rand(8, 3, 48, 48)
        >>> distiller.calibrate(teachers, [images])
        >>> outputs, masks = distiller.forward_teachers(teachers, images)
        >>> loss, metrics = distiller(images, outputs, masks)
        >>> loss.backward()
    """

    def __init__(self, student: Backbone, teachers: Sequence[Teacher], method: Method):
        super().__init__()
        method = method.for_student(student)
        method.check(student, teachers)
        method = replace(method, aligner=method.aligner.for_depth(len(student.blocks)))
        self.method, self.student, self.calibrated = method, student, not method.num_calibration_images
        self.teacher_names = tuple(teacher.name for teacher in teachers)
        if heads := method.compared_heads(teachers):
            cast(TimmBackbone, student).set_heads(heads)
        self._build_student_side()

        features, objectives = method.features, method.active
        self.subsets = {o.teachers: o.subset(len(teachers)) for o in objectives.values() if "tokens" in o.needs}
        self.used = sorted({m for subset in self.subsets.values() for m in subset})
        self.has_cls = tuple(features.has_cls(teacher.backbone) for teacher in teachers)
        widths = [features.width(teachers[m].backbone) for m in self.used]
        with_cls = [self.has_cls[m] and any(o.uses_cls for o in objectives.values()) for m in self.used]
        self.normalizer = method.normalizer.build(widths)
        self.aligner = method.aligner.build(widths, student.width, with_cls, method.fusion.one_target)
        compared = method.aligner.compared_widths(widths, student.width)
        self.fusion = method.fusion.build(compared)
        self.objectives = nn.ModuleDict(
            {name: objective.build(self._shapes(objective, compared)) for name, objective in objectives.items()}
        )

    def _build_student_side(self) -> None:
        """What fills in and reconstructs hidden patches, and the depths at which the student is read."""
        method, student, masking = self.method, self.student, self.method.masking
        self.decoder = self.pixel_decoder = self.mask_token = None
        if isinstance(masking, HidingPatches):
            size = masking.decoder_width, masking.decoder_depth, masking.decoder_heads
            terms = [o for o in method.active.values() if "tokens" in o.needs]
            hidden = any(getattr(term, "where", "all") not in ("visible", "cls") for term in terms)
            if masking.hidden == "drop" and (hidden or masking.decoder_output == "all"):
                self.decoder = MaskedDecoder(student.width, student.grid, student.width, *size)
                if masking.decoder_output == "all":  # compared before the norm (G2SD)
                    self.decoder.norm = nn.Identity()
            if method.needs("pixels"):
                self.pixel_decoder = MaskedDecoder(student.width, student.grid, 3 * student.patch_size**2, *size)
            if masking.hidden == "token":
                self.mask_token = nn.Parameter(torch.zeros(student.width))
        depth, features, taps = len(student.blocks), method.features, method.aligner.num_taps
        inside = depth > 0 and (features.student_depth < 1 or not features.student_norm)
        self.compared_block = block_at(features.student_depth, depth) if inside else 0
        self.tap_blocks = [block_at(tap / taps, depth) for tap in range(1, taps)]
        self.qkv_block = block_at(features.qkv_depth, depth) if method.needs("qkv") else 0
        freeze_unread(student, method, self.qkv_block)

    def _shapes(self, objective: Objective, compared: Sequence[int]) -> Shapes:
        """Channels of the pairs that an objective gets."""
        chosen = [compared[self.used.index(m)] for m in objective.subset(len(self.teacher_names)) if m in self.used]
        own = tuple(chosen[:1] if self.method.fusion.one_target else chosen)
        return Shapes(self.student.width, own, num_heads(self.student), self.student.patch_size)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], teachers: Sequence[TeacherOutput], masks: Masks
    ) -> tuple[Float[Tensor, ""], Callable[[], dict[str, Tensor]]]:
        """One step of arXiv:2508.04816: encode the student's view, align and fuse the teachers, compare.

        Args:
            images: the student's view, values in [0, 1].
            teachers: what each teacher gives, see `forward_teachers`.
            masks: which patches everyone sees.

        Returns:
            The loss, and a function that computes the numbers to log.

        Raises:
            ValueError: something must be calibrated first, or an objective gives no gradient.
        """
        self._check_calibrated()
        images, teachers, masks = repeat_for_masks(images, teachers, masks)
        student = self.encode(images, masks)
        pairs, losses = self.align(student, teachers, masks)
        fused = {
            name: self.method.fusion(self.fusion, [pairs[m] for m in subset]) for name, subset in self.subsets.items()
        }
        visible = masks.student_sees(len(images), self.student.num_patches, images.device)
        parts: dict[str, Tensor] = {}  # name → what each pair and each image adds to the loss
        distances: dict[Hashable, Tensor] = {}
        positions: dict[str, Tensor] = {}
        shown: list[Pair] = []
        for name, objective in self.method.active.items():
            tokens = fused[objective.teachers][0] if "tokens" in objective.needs else []
            own = [teachers[m] for m in objective.subset(len(teachers))]
            compared, positions[name] = objective.pairs(self.objectives[name], tokens, student, own, visible)
            key = objective.distance_key or name
            if key not in distances:
                distances[key] = torch.stack([objective.distance_of(pair) for pair in compared])
            parts[name] = mean_over(distances[key], compared, positions[name], self.method.fusion.own_positions)
            shown = compared if isinstance(objective, FeatureLoss) else shown
        self._reweigh(parts, pairs, masks)
        loss = sum(losses.values(), student.last.new_zeros(()))
        for name, objective in self.method.active.items():
            losses[name] = parts[name].sum()
            loss = loss + objective.weight * losses[name]
            if self.training and not parts[name].requires_grad and torch.is_grad_enabled():
                raise ValueError(f"objective {name!r} gives no gradient, so it trains nothing; leave it out.")
        evidence = self._evidence(
            student, teachers, masks, shown or [p for part in fused.values() for p in part[0]], fused
        )
        teacher_losses = self._teacher_losses(parts, pairs, positions)
        logged = {f"loss/{name}": part.detach() for name, part in losses.items()}
        infinite = torch.stack([~output.patches.isfinite().all() for output in teachers])
        few = share_of(LOGGED_IMAGES)
        blank = images[:few].detach().float().flatten(2).std(dim=2).mean()
        given = [output.patches[:few].to(torch.float32, copy=True) for output in teachers]

        def metrics() -> dict[str, Tensor]:
            for name, broken in zip(self.teacher_names, sum_of_all(infinite.int()), strict=True):
                if broken:
                    raise not_finite(name)
            ours, theirs, shares = (rows_of_all(part) for part in evidence)
            shares = shares.transpose(0, 1)
            named = {f"share_{n}": share for n, share in zip(self.teacher_names, mean_shares(shares), strict=True)}
            seen = zip(self.teacher_names, given, strict=True)
            stds = {"image_std": blank} | {f"std_{name}": rows_of_all(part).std(dim=0).mean() for name, part in seen}
            return logged | teacher_losses() | health_metrics(ours, theirs, shares) | named | stds

        return loss, metrics

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise ValueError(
                "this method is calibrated before it is trained: call distiller.calibrate(teachers, images)."
            )

    def _reweigh(self, parts: dict[str, Tensor], pairs: Mapping[int, Pair], masks: Masks) -> None:
        """Let the fusion weigh the teachers by their losses, once for all objectives that use the same teachers."""
        for name, subset in self.subsets.items():
            mine = [
                key for key, o in self.method.active.items() if o.teachers == name and len(parts[key]) == len(subset)
            ]
            if self.method.fusion.one_target or not mine or masks.noise is None:
                continue
            total = torch.stack([self.method.active[key].weight * parts[key].detach() for key in mine]).sum(dim=0)
            has_target = torch.stack([pairs[m].valid.any(dim=1) for m in subset])
            factors = self.method.fusion.reweigh(total, has_target, masks.noise[:, list(subset)])
            if factors is not None:
                parts |= {key: parts[key] * factors for key in mine}

    def encode(self, images: Float[Tensor, "B 3 H W"], masks: Masks) -> StudentOutput:
        """Run the student and read it wherever the method does."""
        compared = [self.compared_block] if self.compared_block else []
        blocks = sorted({*self.tap_blocks, *compared})
        moved = images if masks.shifts is None else move(images, masks.shifts[:, 0] * self.student.patch_size)
        tokens = move_back(self._run(moved, masks, blocks), masks, 0)
        at = dict(zip(blocks, tokens.intermediates, strict=True))
        read = self._all_positions(at[self.compared_block] if self.compared_block else tokens, masks, fill=True)
        return StudentOutput(
            last=self._all_positions(tokens, masks) if self.compared_block else read,
            compared=read,
            intermediates=tuple(self._all_positions(at[number], masks) for number in self.tap_blocks),
            qkv=tokens.qkv,
            pixels=self._reconstruct(images, tokens, masks),
        )

    def _run(self, images: Float[Tensor, "B 3 H W"], masks: Masks, blocks: Sequence[int]) -> Tokens:
        """The student on images of the step's size; its tokens are on its own grid."""
        student, hidden = self.student, self.method.masking.modes[0]
        read = {"intermediates": blocks, "qkv": self.qkv_block}
        if masks.scale == 1:
            return student(images, masks.student, hidden, self.mask_token, **read)
        with any_size(student.vit) if isinstance(student, TimmBackbone) else nullcontext():
            return on_grid(student(scaled(images, masks.scale, student.patch_size), **read), student.grid)

    def _all_positions(self, tokens: Tokens, masks: Masks, fill: bool = False) -> Float[Tensor, "B N1 D"]:
        """Class token, or the mean of the patches in its place, and the whole map; by ``fill`` with the decoder's."""
        cls, patches, masking = tokens.cls, tokens.patches, self.method.masking
        if self.method.features.pooled:
            cls = patches.mean(dim=1)
        whole = isinstance(masking, HidingPatches) and masking.decoder_output == "all"
        if fill and self.decoder is not None and (masks.student is not None or whole):
            visible = masks.student
            if visible is None:
                visible = torch.arange(self.student.num_patches, device=patches.device).expand(len(patches), -1)
            if whole:  # the class token too
                decoded = self.decoder.predict(self.decoder.decode(tokens.cls, patches, visible))
                patches = decoded[:, -self.student.num_patches :]
                cls = patches.mean(dim=1) if self.method.features.pooled else decoded[:, 0]
            else:
                patches = scatter_patches(patches, visible, self.decoder(tokens.cls, patches, visible))
        elif masking.modes[0] == "drop" and masks.student is not None:
            nothing = patches.new_zeros(self.student.num_patches, patches.shape[2])
            patches = scatter_patches(patches, masks.student, nothing)
        assert cls is not None
        return torch.cat([cls.unsqueeze(1), patches], dim=1).float()

    def _reconstruct(
        self, images: Float[Tensor, "B 3 H W"], tokens: Tokens, masks: Masks
    ) -> tuple[Float[Tensor, "B N P"], Float[Tensor, "B N P"]] | None:
        """The pixel decoder's patches, and the image's own, pixels as the student takes them."""
        if self.pixel_decoder is None or masks.student is None:
            return None
        reconstructed = self.pixel_decoder(tokens.cls, tokens.patches, masks.student).float()
        pixels = (images - self.student.pixel_mean) / self.student.pixel_std
        return reconstructed, patchify(pixels, self.student.patch_size)

    def align(
        self, student: StudentOutput, teachers: Sequence[TeacherOutput], masks: Masks
    ) -> tuple[dict[int, Pair], dict[str, Tensor]]:
        """Student and teacher tokens at one width and at their positions, by teacher; and the aligner's own loss."""
        pairs, own = {}, []
        features, aligner = self.method.features, self.method.aligner
        seen = masks.teachers_see(len(student.last), self.student.num_patches, student.last.device)
        seen = seen | features.every_position | self.method.masking.every_position
        for place, m in enumerate(self.used):
            cls, patches = teachers[m][:2]
            cls = patches.float().mean(dim=1) if features.pooled else cls if self.has_cls[m] else None
            tokens = self.method.normalizer(self.normalizer, given := Tokens(cls, patches), place)
            if self.training:
                self.method.normalizer.follow(self.normalizer, given, place, masks.progress)
            own.append(aligner.own_loss(self.aligner, tokens.patches, place))
            target = self._target(tokens, masks.teachers[m], place).float()
            valid = torch.cat([torch.full_like(seen[m][:, :1], tokens.cls is not None), seen[m]], dim=1)
            pairs[m] = Pair(aligner.student(self.aligner, student, place), target, valid, valid)
        trained = [loss for loss in own if loss is not None]
        return pairs, {aligner.name: torch.stack(trained).mean()} if trained else {}

    def _target(self, tokens: Tokens, visible: Tensor | None, place: int) -> Float[Tensor, "B N1 K"]:
        """Aligned tokens of one teacher at their positions, the class token first; 0 where there is none."""
        aligner, count = self.method.aligner, self.student.num_patches
        patches = aligner.teacher(self.aligner, tokens.patches, place)
        first = torch.zeros_like(patches[:, :1])
        if tokens.cls is not None:
            first = aligner.teacher(self.aligner, tokens.cls.unsqueeze(1), place)
        rows = torch.cat([first, patches], dim=1)
        if visible is None or patches.shape[1] == count:
            return rows
        return scatter_patches(rows, F.pad(visible + 1, (1, 0)), rows.new_zeros(1 + count, rows.shape[2]))

    @torch.no_grad()
    def _evidence(
        self,
        student: StudentOutput,
        teachers: Sequence[TeacherOutput],
        masks: Masks,
        shown: Sequence[Pair],
        fused: Mapping[str, tuple[list[Pair], Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What health is told from: one token of each image of student and targets, the teachers' shares (B, M, n).

        Where only attention or pixels are compared, the targets are the teachers' tokens as they are.
        """
        last = student.last
        if shown:
            target = torch.cat([pair.target for pair in shown], dim=-1)[:, 1:]
            valid = torch.stack([pair.weight > 0 for pair in shown]).all(dim=0)[:, 1:]
        else:
            target = torch.cat([F.layer_norm(o.patches.float(), o.patches.shape[-1:]) for o in teachers], dim=-1)
            valid = torch.ones_like(target[..., 0], dtype=torch.bool)
        if self.decoder is None and self.method.masking.modes[0] == "drop":
            valid = valid & masks.student_sees(len(valid), valid.shape[1], valid.device)
        shares = last.new_full((len(self.teacher_names), *last.shape[:2]), 0.0 if fused else 1.0)
        for name, (_, own) in fused.items():
            shares[list(self.subsets[cast(Any, name)])] += own.detach().float()
        shares = shares / shares.sum(dim=0).clamp(min=1)
        ours, theirs = central_patches(valid, last[:, 1:], target)
        return ours, theirs, shares.transpose(0, 1)

    def _teacher_losses(
        self, parts: Mapping[str, Tensor], pairs: Mapping[int, Pair], positions: Mapping[str, Tensor]
    ) -> Callable[[], dict[str, Tensor]]:
        """For the log, the loss of each teacher in each objective; where targets are fused, to its own target."""
        own: dict[str, Tensor] = {}
        for name, objective in self.method.active.items():
            subset = objective.subset(len(self.teacher_names))
            for place, m in enumerate(subset if len(parts[name]) == len(subset) > 1 else ()):
                own[f"loss/{self.teacher_names[m]}/{name}"] = parts[name][place].detach().sum()
        fused = pairs if self.method.fusion.one_target else {}  # copies, or whole batches would live on until the log
        few = share_of(LOGGED_IMAGES)
        kept = {m: Pair(*(part[:few].detach().clone() for part in pair)) for m, pair in fused.items()}

        @torch.no_grad()
        def losses() -> dict[str, Tensor]:
            found = dict(own)
            for name, objective in self.method.active.items() if kept else ():
                for m in self.subsets[objective.teachers] if objective.distance_key else ():
                    counts = positions[name][:few] & kept[m].valid
                    mean = mean_over(objective.distance_of(kept[m]).unsqueeze(0), [kept[m]], counts).sum()
                    found[f"loss/{self.teacher_names[m]}/{name}"] = mean
            return found

        return losses

    @torch.no_grad()
    def teacher_shares(
        self, images: Float[Tensor, "B 3 H W"], teachers: Sequence[TeacherOutput], masks: Masks
    ) -> Float[Tensor, "M B2 N"]:
        """Each teacher's share of the target at every patch: the weights of the gate; arguments as of `forward`."""
        self._check_calibrated()
        images, teachers, masks = repeat_for_masks(images, teachers, masks)
        pairs, _ = self.align(self.encode(images, masks), teachers, masks)
        shares = images.new_zeros(len(self.teacher_names), len(images), self.student.num_patches)
        for subset in self.subsets.values():
            shares[list(subset)] += self.method.fusion(self.fusion, [pairs[m] for m in subset])[1][..., 1:]
        return shares / shares.sum(dim=0).clamp(min=1)

    def forward_teachers(
        self,
        teachers: Sequence[Teacher],
        images: Float[Tensor, "B 3 H W"],
        progress: float = 0.0,
        noise: Tensor | None = None,
    ) -> tuple[list[TeacherOutput], Masks]:
        """Draw masks and run every teacher on the patches that it may see.

        Args:
            teachers: as this was built for, in their order.
            images: the teachers' view, values in [0, 1].
            progress: share of the training that is done, for masks that move.
            noise: (B, 1 + M, N) uniform in [0, 1), of which masks are drawn; None draws it too.
        """
        if noise is None:
            noise = torch.rand(len(images), 1 + len(teachers), self.student.num_patches, device=images.device)
        masks = drop_unused_masks(self.method.masking(noise, progress), teachers)
        outputs = [self.forward_teacher(teacher, m, images, masks) for m, teacher in enumerate(teachers)]
        return outputs, masks

    def forward_teacher(self, teacher: Teacher, number: int, images: Tensor, masks: Masks) -> TeacherOutput:
        """Run one of the teachers, see `forward_teachers`."""
        method, needs = self.method, self.method.teacher_needs(number, len(self.teacher_names))
        visible, hidden = masks.teachers[number], method.masking.modes[1]
        if masks.shifts is not None:
            images = move(images, masks.shifts[:, 1 + number] * (images.shape[-1] // self.student.grid[0]))
        output = forward_teacher(method.features, teacher.backbone, images, visible, hidden, needs)
        return move_back(output, masks, 1 + number)

    @torch.no_grad()
    def fit(self, tokens: Sequence[Tokens]) -> None:
        """Fit normaliser and aligner on tokens of the same positions: (n, E) and (n, k, E), one entry per teacher."""
        chosen = [tokens[m] for m in self.used]
        if self.method.features.pooled:
            chosen = [part._replace(cls=part.patches.mean(dim=1)) for part in chosen]
        training = self.training
        self.method.normalizer.calibrate(self.normalizer, chosen)
        self.eval()
        normal = [self.method.normalizer(self.normalizer, part, m) for m, part in enumerate(chosen)]
        self.method.aligner.calibrate(self.aligner, [part.patches.flatten(0, 1) for part in normal])
        target = partial(self.method.aligner.teacher, self.aligner)
        aligned = [
            Tokens(None if cls is None else target(cls.unsqueeze(1), m).squeeze(1), target(patches, m))
            for m, (cls, patches, *_) in enumerate(normal)
        ]
        self.method.fusion.calibrate(self.fusion, aligned)
        self.train(training)
        self.calibrated = True

    def calibrate(self, teachers: Sequence[Teacher], images: Iterable[Tensor | Sequence[Tensor]]) -> None:
        """Fit normaliser and aligner on what the teachers give for whole images, a few hundred, in batches.

        Args:
            teachers: as this was built for.
            images: batches (B, 3, H, W) with values in [0, 1]; or of each batch a view for every teacher.
        """
        whole = Masks(None, (None,) * len(teachers))
        device = self.student.pixel_mean.device

        def outputs() -> Iterator[list[TeacherOutput]]:
            for batch in images:
                views = [batch] * len(teachers) if isinstance(batch, Tensor) else batch
                pairs = enumerate(zip(teachers, views, strict=True))
                yield [self.forward_teacher(teacher, m, view.to(device), whole) for m, (teacher, view) in pairs]

        calibrate([self], outputs(), torch.Generator().manual_seed(0))

    def get_extra_state(self) -> dict[str, bool]:
        """A part of the state dict: whether it was calibrated."""
        return {"calibrated": self.calibrated}

    def set_extra_state(self, state: Mapping[str, bool]) -> None:
        """See `get_extra_state`."""
        self.calibrated = bool(state["calibrated"])

    @property
    def token_types(self) -> tuple[str, ...]:
        """Tokens of the student's last layer that an objective trains: patches, and the class token if one reads it."""
        features, count = self.method.features, len(self.teacher_names)
        reading = [o.subset(count) for o in self.method.active.values() if "tokens" in o.needs and o.uses_cls]
        at_end = features.student_depth == 1 and not features.pooled and not features.every_position
        trained = at_end and any(self.has_cls[m] for subset in reading for m in subset)
        return ("cls", "patch") if trained else ("patch",)


CALIBRATION_TOKENS = 16
"""Patches per image that aligners are fitted on."""


def calibrate(
    distillers: Sequence[Distiller], batches: Iterable[Sequence[TeacherOutput]], generator: torch.Generator
) -> None:
    """Fit distillers of one method, on one grid, on outputs for whole images; a random few patches of each image.

    Args:
        distillers: of the method.
        batches: of each batch the output of every teacher.
        generator: draws the patches.

    Raises:
        TrainingError: a teacher's outputs are not finite.
    """
    count, found = distillers[0].student.num_patches, []
    for outputs in batches:
        device, size = outputs[0].patches.device, len(outputs[0].patches)
        rows = torch.rand(size, count, generator=generator).argsort(dim=1)[:, :CALIBRATION_TOKENS].to(device)
        chosen = [Tokens(output.cls, gather_patches(output.patches, rows)) for output in outputs]
        found.append([map_tokens(Tensor.float, part) for part in chosen])
    tokens = [
        Tokens(None if p[0].cls is None else torch.cat([t.cls for t in p]), torch.cat([t.patches for t in p]))
        for p in zip(*found, strict=True)
    ]
    for name, part in zip(distillers[0].teacher_names, tokens, strict=True):
        if not (part.patches.isfinite().all() and (part.cls is None or part.cls.isfinite().all())):
            raise not_finite(name)
    for distiller in distillers:
        distiller.fit(tokens)


def not_finite(name: str) -> TrainingError:
    """What is said of a teacher that gives NaN or infinite numbers."""
    return TrainingError(
        f"the outputs of the teacher {name!r} are not finite; check its file with comad teachers inspect, or pass "
        "--run.precision fp32."
    )


def repeat_for_masks(
    images: Float[Tensor, "B 3 H W"], teachers: Sequence[TeacherOutput], masks: Masks
) -> tuple[Float[Tensor, "B2 3 H W"], Sequence[TeacherOutput], Masks]:
    """Repeat images and teacher outputs where the student sees each image under several masks."""
    if masks.student is None or len(masks.student) == len(images):
        return images, teachers, masks
    times = len(masks.student) // len(images)

    def again(part: Tensor) -> Tensor:
        return part.repeat(times, *(1,) * (part.ndim - 1))

    outputs = [map_output(again, output) for output in teachers]
    visible = tuple(None if part is None else again(part) for part in masks.teachers)
    noise = None if masks.noise is None else again(masks.noise)
    return again(images), outputs, masks._replace(teachers=visible, noise=noise)


def scaled(images: Float[Tensor, "B 3 H W"], scale: float, patch_size: int) -> Float[Tensor, "B 3 h w"]:
    """Images at a share of their size, in whole patches, one at least."""
    side = max(1, round(images.shape[-1] * scale / patch_size)) * patch_size
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def on_grid(tokens: Tokens, grid: tuple[int, int]) -> Tokens:
    """Patches of a square grid, and those of ``intermediates``, on another one."""
    side = math.isqrt(tokens.patches.shape[1])
    inner = tuple(on_grid(part, grid) for part in tokens.intermediates)
    return tokens._replace(patches=resample_patches(tokens.patches, (side, side), grid), intermediates=inner)


def move_back(tokens: Tokens, masks: Masks, network: int) -> Tokens:
    """Patches of moved images at the positions where they came from, here and in ``intermediates``."""
    if masks.shifts is None:
        return tokens
    inner = tuple(move_back(part, masks, network) for part in tokens.intermediates)
    return tokens._replace(patches=move_patches(tokens.patches, -masks.shifts[:, network]), intermediates=inner)


def freeze_unread(student: Backbone, method: Method, qkv_block: int) -> None:
    """Freeze the blocks that no objective reads, so that they let pass what comes from below unchanged.

    A loss on queries, keys and values alone (TinyMIM) leaves what follows them without gradient: the output projection
    and MLP of that block, and the final norm.
    """
    depth = method.features.student_depth
    if method.needs("pixels") or (method.needs("tokens") and depth == 1 and method.features.student_norm):
        return
    if isinstance(student, TimmBackbone):
        student.freeze_after(block_at(depth, len(student.blocks)) if method.needs("tokens") else 0, qkv_block)
