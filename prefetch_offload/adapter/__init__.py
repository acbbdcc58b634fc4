"""What ties the engine to diffusers, accelerate, transformers and peft."""
