from topk_experiments.show.html import drawn
from topk_experiments.show.plots import legend_below, narrow, new_figure, png_of, save


def figure_of(panels):
    figure = new_figure(width=5 * panels, height=4)
    for number in range(panels):
        figure.add_subplot(1, panels, number + 1).plot([1, 2], [1, 2], label="top-k")
    legend_below(figure, columns=panels)
    return figure


def size_of(png):
    assert png.startswith(b"\x89PNG")
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


def test_a_picture_for_a_phone_has_its_panels_below_one_another(tmp_path):
    path = tmp_path / "time.png"
    figure = figure_of(3)
    save(figure, path)
    width, height = size_of(path.read_bytes())
    assert width > 3 * height
    width, height = size_of(narrow(path).read_bytes())
    assert height > 2 * width
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert tops == sorted(tops, reverse=True)
    assert len(set(tops)) == 3


def test_a_single_panel_and_a_panel_with_a_colour_bar_stay_as_they_are(tmp_path):
    save(figure_of(1), tmp_path / "one.png")
    figure = figure_of(2)
    figure.colorbar(figure.axes[0].imshow([[1.0]]), ax=figure.axes[0])
    save(figure, tmp_path / "heat.png")
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "heat.png"}


def test_a_page_shows_the_picture_for_a_phone_on_narrow_screens_alone():
    html = drawn("Time", figure_of(2))
    assert html.startswith('<picture><source media="(max-width: 40rem)" srcset="data:image/png;base64,')
    assert html.count("data:image/png;base64,") == 2
    assert "<source" not in drawn("Time", figure_of(1))
    assert size_of(png_of(figure_of(2)))[0] == 1500
