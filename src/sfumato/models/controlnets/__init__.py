"""Networks that follow a U-Net or a transformer and steer it."""
