"""Train with ms-swift, guarded: swift sft --external_plugins ms_swift_guard.py --callbacks mistral_guard ..."""

from swift.callbacks import callbacks_map

from pytest_mistral_lora import MistralGuard

callbacks_map["mistral_guard"] = lambda args, trainer: MistralGuard()
