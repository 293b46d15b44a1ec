"""What files of a model that reads pictures are called, and what they say of it: known without torch."""

from __future__ import annotations

#: Files that say how pictures are prepared; a model has one of them.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
#: What EfficientNet-Lite is called where motet has converted it; how its pictures are prepared stands beside that.
MODEL_TYPE = "efficientnet_lite"
