"""Images: one rule for every way in, and the ways out.

What comes in becomes 8-bit images of 1 (grey), 3 (colour) or 4 (colour and opacity) channels:

    uint8 arrays and tensors    [N, H, W, C], or [N, H, W] of grey ones; of any strides
    floating-point tensors      [N, C, H, W] in [-1, 1]
    .npz, .npy                  as arrays: arr_0, with integer labels in arr_1
    picture files, PIL images   of the formats in `pictures.FORMATS`; turned upright, the first frame of an animation,
                                16 bits scaled to 8; 32-bit and floating-point ones are refused
    folders                     their picture files, subfolders being classes; the others are counted

Another layout, dtype or range is refused in one line. Sizes are checked before memory is taken.
"""

from fastddpm.common.images.archives import is_archive, read_npz
from fastddpm.common.images.drawing import (
    CAPTION_HEIGHT,
    GAP,
    check_canvas,
    evenly,
    grid,
    grid_size,
    strip,
    to_pil,
    trajectory_strip,
)
from fastddpm.common.images.folders import Listing, few, list_pictures, look_at_pictures, picture_files
from fastddpm.common.images.pictures import (
    FORMATS,
    MODES,
    check_shape,
    fit_pixels,
    load_image,
    look,
    open_picture,
    read_pixels,
)
from fastddpm.common.images.pixels import (
    CHANNELS,
    MOST_LABELS,
    check_ids,
    check_memory,
    check_range,
    check_size,
    from_uint8,
    pixels_of_array,
    pixels_of_tensor,
    to_uint8,
)
from fastddpm.common.images.saving import check_drawable, save_folder, save_gif, save_grid, save_npz, save_picture

__all__ = [
    "CAPTION_HEIGHT",
    "CHANNELS",
    "FORMATS",
    "GAP",
    "MODES",
    "MOST_LABELS",
    "Listing",
    "check_canvas",
    "check_drawable",
    "check_ids",
    "check_memory",
    "check_range",
    "check_shape",
    "check_size",
    "evenly",
    "few",
    "fit_pixels",
    "from_uint8",
    "grid",
    "grid_size",
    "is_archive",
    "list_pictures",
    "load_image",
    "look",
    "look_at_pictures",
    "open_picture",
    "picture_files",
    "pixels_of_array",
    "pixels_of_tensor",
    "read_npz",
    "read_pixels",
    "save_folder",
    "save_gif",
    "save_grid",
    "save_npz",
    "save_picture",
    "strip",
    "to_pil",
    "to_uint8",
    "trajectory_strip",
]
