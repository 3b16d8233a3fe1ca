"""Operations of a model, each a PyTorch reference and a Triton kernel under one signature."""
