"""One style for the plots of the tutorials: legible on light and dark pages, and on a phone."""

import matplotlib as mpl
from matplotlib_inline.backend_inline import set_matplotlib_formats

NEUTRAL = "#80868e"  # a contrast of about 4 with white and with black
BLUE, ORANGE, GREEN, RED = "#3d8bd9", "#dd7a2b", "#2f9e6e", "#d9534f"
COLORS = (BLUE, ORANGE, GREEN, RED)

WIDTH = 4.5  # inches; a phone shows a figure of this width with letters of about eleven pixels


def use() -> None:
    """Apply the style. Figures are SVG files without a date, so that the same data give the same file."""
    mpl.rcParams.update(
        {
            "axes.edgecolor": NEUTRAL,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.labelcolor": NEUTRAL,
            "axes.prop_cycle": mpl.cycler(color=COLORS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": NEUTRAL,
            "axes.titlesize": 10,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "figure.figsize": (WIDTH, 2.8),
            "font.size": 10,
            "grid.alpha": 0.3,
            "grid.color": NEUTRAL,
            "image.cmap": "gray",
            "image.composite_image": False,
            "image.interpolation": "none",  # embeds pixels as they are
            "legend.frameon": False,
            "legend.labelcolor": NEUTRAL,
            "lines.linewidth": 1.8,
            "savefig.facecolor": "none",
            "svg.hashsalt": "normfused",
            "text.color": NEUTRAL,
            "xtick.color": NEUTRAL,
            "ytick.color": NEUTRAL,
        }
    )
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    set_matplotlib_formats("svg", metadata=nothing, bbox_inches=None)


def show_pictures(axes, pictures, titles) -> None:
    """Show a picture (H, W) or (H, W, 3) in each of the axes, without ticks."""
    for ax, picture, title in zip(axes, pictures, titles, strict=True):
        ax.imshow(picture)
        ax.set_title(title)
        ax.set_axis_off()


def show_grid(ax, cells, title) -> None:
    """Show samples (rows) by channels (columns), with the cells that are 1 in color."""
    ax.pcolormesh(cells, cmap=mpl.colors.ListedColormap(["none", ORANGE]), edgecolors=NEUTRAL, linewidth=0.8)
    ax.set(title=title, xlabel="C", ylabel="N", aspect="equal", xticks=[], yticks=[])
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
