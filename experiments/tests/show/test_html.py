from topk_experiments.show.html import footer, page, picture, table


def test_text_is_escaped_and_every_table_scrolls_in_its_own_box():
    html = page("<title>", table([["", "a & b"], ["<row>", "1"]]), picture('"quoted"', b"png"))
    assert "<h1>&lt;title&gt;</h1>" in html
    assert "<th>a &amp; b</th>" in html
    assert "<td>&lt;row&gt;</td><td>1</td>" in html
    assert 'alt="&quot;quoted&quot;"' in html
    assert html.count('<div class="scroll"><table') == html.count("<table") == 1
    assert 'name="viewport" content="width=device-width' in html


def test_the_footer_says_unknown_for_what_a_record_lacks():
    record = {"environment": {"torch": "2.13", "commit": None}, "config": {"threads": 2, "backend": "cpu"}}
    assert footer(record, "<more>") == (
        "<footer>topk_attention unknown (unknown), torch 2.13, transformers unknown, Python unknown, unknown, "
        "2 threads, backend cpu, unknown, &lt;more&gt;</footer>"
    )
