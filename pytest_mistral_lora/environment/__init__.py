"""The user's installation: versions and their support, extras, known faults of a combination."""

from pytest_mistral_lora.environment.faults import (
    InstallationFault,
    LibraryState,
    installed_versions,
    known_cause_lines,
    library_states,
    present_faults,
)

__all__ = [
    "InstallationFault",
    "LibraryState",
    "installed_versions",
    "known_cause_lines",
    "library_states",
    "present_faults",
]
