"""Which images of a batch DALI cannot decode. Its own message names a file only sometimes, and its pipeline is then lost."""

import functools
from collections.abc import Callable, Iterator, Sequence

from nvidia.dali import Pipeline

from pipeline.graphs import image_pipeline
from pipeline.plan import Samples
from pipeline.reader import Fetch, fetched, graph_inputs


def is_about_an_image(error: RuntimeError) -> bool:
    """Whether DALI failed in reading or decoding files, and not for a fault in the program."""
    return any(operator in str(error) for operator in ("fn.io.file.read", "fn.decoders", "fn.peek_image_shape"))


def cause_of(error: RuntimeError) -> str:
    """What happened, in one line out of DALI's dozen: the one after "encountered:"."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines()]
    cause = next(filter(None, lines), str(error)).rstrip(" :")
    if cause.startswith(("Failed to decode sample", "nvImageCodec failure")):
        return "corrupt image data"  # DALI's word is a number that nobody outside can read
    return cause


def undecodable(samples: Samples, crop: int | None, fetch: Fetch | None, *, whole: bool = False) -> dict[int, str]:
    """Try the samples one by one on the CPU. Returns the indices of those that fail, with DALI's reason.

    whole: decode the whole images, and not only the windows.
    """
    one_by_one = (samples.take(slice(index, index + 1)) for index in range(len(samples.labels)))
    alone = [graph_inputs(*one, from_files=fetch is None) for one in fetched(one_by_one, fetch)]
    make_pipeline = functools.partial(
        image_pipeline,
        from_files=fetch is None,
        batch_size=1,
        crop=crop,
        device_id=None,
        decoder="cpu",
        half=False,
        threads=1,
        prefetch=1,
        whole=whole,
    )
    return {index: reason for index, (_, reason) in enumerate(each_alone(alone, make_pipeline)) if reason}


def each_alone(
    inputs: Sequence[tuple], make_pipeline: Callable[[Callable[[], tuple]], Pipeline]
) -> Iterator[tuple[tuple | None, str]]:
    """Run inputs, each of one sample, through a DALI pipeline of batch size 1, and through a new one after each failure.

    make_pipeline: builds a pipeline over a source. Yields each sample's outputs and "", or None and why DALI failed.
    """
    done = 0
    while done < len(inputs):
        pipeline, reason = _pipeline_over(inputs[done:], make_pipeline), ""
        while done < len(inputs) and not reason:
            try:
                outputs = pipeline.run()
            except RuntimeError as error:
                if not is_about_an_image(error):
                    raise
                outputs, reason = None, cause_of(error)  # the pipeline is of no use any more
            done += 1
            yield outputs, reason


def _pipeline_over(inputs: Sequence[tuple], make_pipeline: Callable[[Callable[[], tuple]], Pipeline]) -> Pipeline:
    remaining = iter(inputs)
    return make_pipeline(lambda: next(remaining))
