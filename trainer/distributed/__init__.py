"""Training in several processes: torchrun and FSDP."""
