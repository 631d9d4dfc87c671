"""The fused loss beside its products."""
