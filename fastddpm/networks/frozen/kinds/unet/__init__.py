"""`fastddpm.UNet`, frozen: what it is (`blueprint`), its folds (`folding`) and its layers in order (`lowering`)."""
