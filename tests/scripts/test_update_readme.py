from scripts.update_readme import main


def test_the_readme_lists_the_methods_there_are(capsys) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err
