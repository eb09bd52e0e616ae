from vlmoe_core.data.example import Example


def test_words_are_the_text_or_its_token_ids() -> None:
    assert Example("a", text="two dogs").words == "two dogs"
    assert Example("a", text_ids=(17, 4, 9)).words == "17 4 9"
    assert Example("a").words == ""
