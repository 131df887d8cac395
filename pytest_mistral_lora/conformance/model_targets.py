"""The targets of models: folders of adapters and merged models, GGUF files, and the model of a trainer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.kept_property import KeptProperty
from pytest_mistral_lora.checkpoint.tokenizer_folder import GENERATION_CONFIG, MODEL_CONFIG, GivenFiles
from pytest_mistral_lora.conformance.finding import Finding, Result, in_words
from pytest_mistral_lora.conformance.targets import (
    RecipeTarget,
    Target,
    checkpoint_paths,
    free_name,
    given_path,
    name_of,
)
from pytest_mistral_lora.errors import NoOracleError, PinError, RecipeError
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import NamedSource, Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.templates import ChatTemplate
    from pytest_mistral_lora.checkpoint.recognition import Recognition
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.checks import Subject
    from pytest_mistral_lora.records.adapter_folder import AdapterFolder
    from pytest_mistral_lora.records.gguf_file import GgufFile


@dataclass(frozen=True)
class AdapterTarget(Target):
    """An adapter folder, or a merged model's.

    Attributes:
        given: The folder with the base that the user named; None to look for the base, or to take the recipe's.
        dataset: The files that it was trained on, in order, if it was named without its recipe; may be empty.
        beside: The folders of the run, which all targets share; one of them may be the adapter of a merged model.
        maker: The recipe that made it; None if it was named without one.
    """

    given: AdapterFolder | None = field(default=None, compare=False)
    dataset: tuple[Path, ...] = ()
    beside: Sequence[AdapterFolder] = field(default=(), compare=False)
    maker: RecipeTarget | None = None

    @classmethod
    def made_by(cls, recipe: RecipeTarget, output: Path | None = None) -> AdapterTarget | None:
        """Return the folder that a recipe made, with its base and rows; None if folder or recipe is missing.

        Args:
            recipe: The recipe.
            output: The folder, if it is known without the recipe.
        """
        # a check reports a bad recipe: an error during collection would also end the user's own tests
        with suppress(RecipeError):
            output = recipe.recipe.output if output is None else output
            if output.is_dir():
                return cls(recipe.name, output, maker=recipe)
        return None

    @property
    def trained_on(self) -> tuple[Path, ...]:
        """The files that it was trained on, in the order of its recipe; may be empty."""
        return self.dataset if self.maker is None else self.maker.recipe.train_paths

    @cached_property
    def adapter(self) -> AdapterFolder:
        """The folder; each file is read once for all subjects, and the base is never fetched."""
        from pytest_mistral_lora.records.adapter_folder import AdapterFolder

        if self.maker is None:
            return self.given or AdapterFolder(self.folder)
        path = self.maker.recipe.base.path
        try:
            base = self.maker.base_folder
            return AdapterFolder(self.folder, None if path is None else base)
        except PinError:
            from pytest_mistral_lora.records.base_location import LocatedBase

            folder = AdapterFolder(self.folder, None if path is None else BaseFolder(path))
            # another check reports the base of the recipe; never search for another base
            vars(folder)["located_base"] = LocatedBase(None, "the base of its recipe cannot be used (ML208)")
            return folder

    @property
    def fix_paths(self) -> dict[str, str]:
        """The paths of the folder, which has a tokenizer of its own."""
        return {**checkpoint_paths(self.folder), "adapter": str(self.folder)}

    @property
    def folder(self) -> Path:
        """The folder's path."""
        return given_path(self.path)

    @property
    def is_merged(self) -> bool:
        """Whether it is a merged model, by its manifest or else by full weights without an adapter."""
        adapter = self.adapter
        if not self.folder.is_dir() or not adapter.model_files:
            return False
        if adapter.has_manifest:
            return adapter.valid_manifest is not None and adapter.kind == "merged"
        return not (adapter.config_file.exists() or adapter.tensors_file.exists())


@dataclass(frozen=True)
class GgufTarget(Target):
    """A GGUF file of a model or an adapter, as servers read it.

    Attributes:
        judge: The target whose tokenizer it is compared with; None for the folders' or the recognised tokenizer.
        base: The base checkpoint, or None.
        folders: The adapter and merged folders of the run: one of them may be the source of the file.
    """

    judge: Target | None = None
    base: BaseFolder | None = field(default=None, compare=False)
    folders: Sequence[AdapterFolder] = field(default=(), compare=False)

    @property
    def file(self) -> Path:
        """The GGUF file."""
        return self.path or Path(self.name)

    @KeptProperty
    def content(self) -> GgufFile:
        """The file's metadata and tensors.

        Raises:
            InputError: If the file cannot be read.
        """
        from pytest_mistral_lora.records.gguf_file import GgufFile

        return GgufFile(self.file)

    @cached_property
    def model(self) -> BaseFolder | None:
        """The full weights to compare the file with: a merged model's, else the base's, else None."""
        return self.model_of_run()

    def model_of_run(self) -> BaseFolder | None:
        """Return the folder of the run that has full weights, else that of the base, else None."""
        for folder in self.folders:
            if any(folder.path.glob("model*.safetensors")):
                return folder.checkpoint
        return self.base

    @property
    def adapter(self) -> AdapterFolder | None:
        """The adapter folder to compare an adapter's file with, or None."""
        return next((folder for folder in self.folders if folder.config_file.exists()), None)

    @KeptProperty
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer to compare the file with: the named one, its model's, or the recognised one.

        Raises:
            NoOracleError: If no tokenizer is named, and the vocabulary does not belong to a known tokenizer.
            TokenizerError: If the tokenizer cannot be loaded.
        """
        from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
        from pytest_mistral_lora.checkpoint.recognition import NAME_IT, recognise_vocabulary
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        if self.judge is not None:
            return self.judge.tokenizer
        if self.oracle_name is not None:
            known = self.oracle_name in SHIPPED
            return CheckpointTokenizer(shipped_tokenizer(self.oracle_name) if known else Path(self.oracle_name))
        if self.model is not None:
            return self.model.tokenizer()
        stored = self.content.vocabulary
        found = None if stored is None else recognise_vocabulary(stored, self.content.template or "")
        if found is None or found.oracle is None:
            kind = f"its vocabulary is of the kind {self.content.setting('model')!r}"
            reason = kind if found is None else found.reason
            raise NoOracleError(reason, place=str(self.file), expected="a Mistral tokenizer", next_step=NAME_IT)
        return CheckpointTokenizer(found.oracle.path)


@dataclass(frozen=True)
class ModelFileTarget(GgufTarget):
    """A file by which a server makes a model: it names a GGUF file or a folder, a template and settings."""

    @property
    def model_file(self) -> Path:
        """The file."""
        return self.path or Path(self.name)

    @cached_property
    def named(self) -> Path | None:
        """The GGUF file or folder that it names; None if it names none that is here."""
        from pytest_mistral_lora.programs.model_files import path_in

        return path_in(self.model_file)

    @property
    def file(self) -> Path:
        """The GGUF file that it names, or else the file itself, which holds no model."""
        return self.named if self.named is not None and self.named.is_file() else self.model_file

    @cached_property
    def model(self) -> BaseFolder | None:
        """The folder that it names, or else that of the run."""
        if self.named is not None and self.named.is_dir():
            return BaseFolder(self.named)
        return self.model_of_run()


MODEL_PLACE, TOKENIZER_PLACE = (Place(NamedSource(name, is_value=True)) for name in ("model", "processing_class"))
"""The names of the two in a trainer, as places of findings."""

_LORA = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.(?P<adapter>[^.]+)")
# DDP, FSDP and torch.compile put these before or between the names of a model
_WRAPPERS = re.compile(r"(?:^module\.|_fsdp_wrapped_module\.|_orig_mod\.)")


def without_wrappers(name: str) -> str:
    """Return the name of a module or a parameter without those of the wrappers around and within a model."""
    return _WRAPPERS.sub("", name)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainerTarget(Target):
    """The model and the tokenizer of a trainer, in memory: it has no path.

    Attributes:
        model: The model, with its adapter.
        processing_class: The tokenizer or processor of the trainer.
        known: The Mistral tokenizer that applies.
        base: The folder that the tokenizer was loaded from; None if it is not on this machine.
        has_inputs: Whether the batches have inputs beside texts, such as images.
        trains_eos: Whether a label of the batches is EOS.
        has_eos: Whether EOS is trained on in the dataset, before the collator.
        ids: The ids of the batches.
        left_out: Reasons why a part of the run is not judged, by the case of a check.
        fixes: The fix of each rule in the words of the trainer.
    """

    model: Any
    processing_class: Any
    known: Recognition
    base: CheckpointTokenizer | None = None
    has_inputs: bool = False
    trains_eos: bool = False
    has_eos: bool = False
    ids: Collection[int] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    fixes: Mapping[str, str] = field(default_factory=dict)

    def in_words(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Return findings with the fixes of the trainer."""
        return in_words(findings, self.fixes)

    @property
    def fix_paths(self) -> dict[str, str]:
        """The paths of the folder that the tokenizer was loaded from, or else of the Mistral tokenizer that applies."""
        from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file

        oracle = self.known.oracle
        # of a folder with other tokens, `training_template` returns its own template
        if self.base is not None and (oracle is None or oracle_file(self.base.path) or self.known.is_exact):
            return checkpoint_paths(self.base.path)
        return {} if oracle is None else checkpoint_paths(oracle.path)

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        """The trainer's tokenizer, beside the model's configurations and with the Mistral tokenizer that applies."""
        from pytest_mistral_lora.checkpoint.loaded_tokenizer import LoadedTokenizer, text_tokenizer

        return LoadedTokenizer.of(text_tokenizer(self.processing_class), self._configurations, self.known)

    @property
    def _configurations(self) -> GivenFiles:
        """The model's configurations as a checkpoint has them in files."""
        contents, places = {}, {}
        for name, key in ((MODEL_CONFIG, "config"), (GENERATION_CONFIG, "generation_config")):
            config = getattr(self.model, key, None)
            # a model of a user's own may have another kind of configuration
            if config is not None and hasattr(config, "to_json_string"):
                contents[name] = config.to_json_string(use_diff=False).encode()
                places[name] = Place(NamedSource(f"{MODEL_PLACE}.{key}", is_value=True))
        return GivenFiles(Path(str(TOKENIZER_PLACE)), home=TOKENIZER_PLACE, contents=contents, places=places)

    @property
    def template_text(self) -> str | None:
        """The chat template of the trainer's tokenizer, or of its processor; None if there is none."""
        stored = getattr(self.processing_class, "chat_template", None)
        text = stored.get("default") if isinstance(stored, dict) else stored
        return text if isinstance(text, str) else None

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template, and a Mistral tokenizer applies."""
        return bool(self.template_text) and self.known.oracle is not None

    @property
    def reports_template(self) -> bool:
        """Whether a check of the trainer reports `template_finding`: not if the template is the base's."""
        return bool(self.template_findings.findings or self._named_tokens)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the trainer, with its tokenizer."""
        from pytest_mistral_lora.chat.templates import ChatTemplate

        return ChatTemplate(self.tokenizer.fast, self.template_text)

    def template_finding(self) -> Finding | None:
        """Return the finding about the template, or about the named tokens that it writes."""
        from pytest_mistral_lora.conformance.base_tokenizer import loaded_template_result

        found = self.template_findings.findings or self._named_tokens
        if not found:
            # as the base has it, and so no fault of this run alone
            of_base = loaded_template_result(self.tokenizer, self.template_text or "", None).findings
            found = tuple(finding.under("ML004") for finding in of_base)
        return next(iter(found), None)

    @cached_property
    def _named_tokens(self) -> tuple[Finding, ...]:
        from pytest_mistral_lora.conformance.tokenizer.ids import named_tokens

        # a template writes BOS and EOS
        return tuple(named_tokens(self, ("bos", "eos")))

    @cached_property
    def pad_findings(self) -> tuple[Finding, ...]:
        """The finding about a pad token that is EOS, if the collator has masked the EOS of the dataset."""
        from pytest_mistral_lora.checkpoint.loaded_tokenizer import text_tokenizer
        from pytest_mistral_lora.conformance.tokenizer.ids import pad

        if self.trains_eos or not self.has_eos or text_tokenizer(self.processing_class) is None:
            return ()
        return tuple(finding for finding in pad(self) if finding.rule == "ML204")

    @cached_property
    def template_findings(self) -> Result:
        """The template compared with the base's and with mistral-common."""
        from pytest_mistral_lora.conformance.base_tokenizer import loaded_template_result

        return loaded_template_result(self.tokenizer, self.template_text or "", self.base)

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """The model's parameters by name, without the names of wrappers."""
        return {without_wrappers(name): parameter for name, parameter in self.model.named_parameters()}

    @cached_property
    def modules(self) -> Mapping[str, Any]:
        """The model's modules by name, without the names of wrappers."""
        return {without_wrappers(name): module for name, module in self.model.named_modules()}

    @cached_property
    def lora_configs(self) -> Mapping[str, Any]:
        """The configuration of each LoRA adapter, by the adapter's name."""
        configs = getattr(self.model, "peft_config", None) or {}
        return {name: config for name, config in configs.items() if getattr(config, "peft_type", "") == "LORA"}

    @cached_property
    def lora_layers(self) -> Mapping[str, Any]:
        """The layers with a LoRA adapter, by name; empty for adapters that are made without PEFT."""
        if not self.lora_configs:
            return {}
        return {
            name: module
            for name, module in self.modules.items()
            if hasattr(module, "lora_A") and hasattr(module, "scaling")
        }

    @cached_property
    def adapter_tensors(self) -> Mapping[str, Any]:
        """The LoRA tensors of the active adapters, by name."""
        found = {name: match["adapter"] for name in self.parameters if (match := _LORA.search(name))}
        # a method in a model of transformers, which asks for the newest PEFT
        active = getattr(self.model, "active_adapters", ())
        if callable(active) or not active:
            active = set(found.values())
        return {name: self.parameters[name] for name, adapter in found.items() if adapter in active}


@dataclass(frozen=True)
class WatchedTarget(Target):
    """Something that was judged before the session: it has the results, and cannot judge it again.

    Attributes:
        results: The result of each check, by its subject and its case.
    """

    results: Mapping[tuple[Subject, str], Result] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordTarget(WatchedTarget):
    """The record of an adapter's or a merged model's folder: a check has the name of a recorded value or transcript.

    `path` is the folder.
    """

    @classmethod
    def of(cls, folder: Path, subject: Subject, results: Iterable[tuple[str, Result]]) -> RecordTarget:
        """Return the target of a folder whose record was compared.

        Args:
            folder: The folder.
            subject: The subject of the checks.
            results: The name of each recorded thing, and its result. A name becomes a part of a node id; a taken one
                gets a number.
        """
        cases: dict[str, Result] = {}
        for name, result in results:
            # a list of known deviations has a node id a line, and a # after white space ends it
            case = re.sub(r"\s", "_", printable(name, lines=False)) or "_"
            cases[free_name(case, cases)] = result
        return cls(name_of(folder), folder, results={(subject, case): result for case, result in cases.items()})

    @property
    def fix_paths(self) -> dict[str, str]:
        """The paths of the folder."""
        folder = given_path(self.path)
        return {**checkpoint_paths(folder), "adapter": str(folder)}

    @property
    def has_manifest_values(self) -> bool:
        """Whether its checks are the values of a manifest."""
        return any(subject == "manifest" for subject, _ in self.results)
