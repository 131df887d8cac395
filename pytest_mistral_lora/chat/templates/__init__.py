"""The checkpoint's chat template: rendered in a sandbox, given generation blocks, compared with the oracle."""
