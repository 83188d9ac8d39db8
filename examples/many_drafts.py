# SPDX-License-Identifier: Apache-2.0
"""Many drafts of one prompt, and the chosen ones finished: a draft is a fraction of a clip's work.

python examples/many_drafts.py "a small green box rises at night" --count 6
python examples/many_drafts.py "a small green box rises at night" --count 6 --finish 2 5

The first command ends with a contact sheet of the drafts; the second one, after you have looked at
it, with clips that have the bits of a run that makes draft and clip at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pw_export.bundle_cache import demo_bundle
from pw_runtime import (
    Reporter,
    Request,
    RunOptions,
    find_preset,
    generate,
    make_prompts,
    open_bundle,
)


def main() -> None:
    """Make the drafts, or finish those that are named."""
    parser = argparse.ArgumentParser(description="Make drafts; finish the chosen ones.")
    parser.add_argument("prompt")
    parser.add_argument("--count", type=int, default=6, help="drafts, each with its own seed")
    parser.add_argument("--finish", nargs="+", metavar="ID", default=[])
    parser.add_argument("--model", help="a bundle; default: the built-in model")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--out", type=Path, default=Path("clips"))
    given = parser.parse_args()

    bundle = open_bundle(given.model or demo_bundle(print))
    preset = find_preset(given.preset)
    # A prompt's seed follows from its position: these differ in nothing else.
    prompts = make_prompts([(str(number), given.prompt) for number in range(given.count)])
    drafts = given.out / "drafts"
    reporter = Reporter(quiet=True)  # says the files of finished clips, and what goes wrong
    if unknown := set(given.finish) - {prompt.id for prompt in prompts}:
        parser.error(f"no draft {', '.join(sorted(unknown))}: they are 0 to {given.count - 1}")
    if given.finish:
        chosen = tuple(prompt for prompt in prompts if prompt.id in given.finish)
        request = Request(prompts=chosen, preset=preset, out=given.out, drafts=drafts)
        generate(request, bundle, reporter)
    else:
        options = RunOptions(draft_only=True, save_latents=True)
        request = Request(
            prompts=prompts, preset=preset, out=drafts, options=options, contact_sheet=True
        )
        generate(request, bundle, reporter)
        print(f"look at {drafts}/contact_sheet.png, then add --finish and the numbers you like")


if __name__ == "__main__":
    main()
