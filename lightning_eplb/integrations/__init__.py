"""Adapters to DDP, FSDP1, Fabric, and Lightning's trainer, precision and gradient clipping."""
