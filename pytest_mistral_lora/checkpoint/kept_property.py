"""A cached property that keeps its error."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pytest_mistral_lora.errors import MistralLoraError

if TYPE_CHECKING:
    KeptProperty = cached_property
else:

    class KeptProperty(cached_property):
        """A cached property that keeps its error, too.

        Hashing the weights of a base can take hours, and a library that panics prints its stack each time.
        """

        def __get__(self, instance, owner=None):
            """Return the value, or raise the error, of the first access."""
            if instance is None:
                return self
            key = f"{self.attrname} failed"
            if key in vars(instance):
                raise vars(instance)[key]
            try:
                return super().__get__(instance, owner)
            except MistralLoraError as error:
                vars(instance)[key] = error.with_traceback(None)
                raise
