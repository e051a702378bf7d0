"""Pictures of what a reduction did; PIL only."""

from vtr.viz.patches import draw_patches, patch_boxes
from vtr.viz.pixels import views_from_inputs, views_from_pixels, views_from_videos
from vtr.viz.report import draw
from vtr.viz.sheet import Tile, contact_sheet

__all__ = ["Tile", "contact_sheet", "draw", "draw_patches", "patch_boxes", "views_from_inputs", "views_from_pixels", "views_from_videos"]
