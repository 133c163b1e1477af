"""What the HTML pages of a study and of a monitor share: style, script, charts. A page is one file without network."""
