"""What the commands of the command line do. `prefetch_offload.cli` holds their options."""
