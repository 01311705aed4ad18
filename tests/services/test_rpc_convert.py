"""Values survive the way to the wire and back; what cannot be converted names its field."""

from __future__ import annotations

import math
import struct

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import BudgetOutOfRange, FieldInvalid, Internal, SamplingOutOfRange
from arbitrage.core.ports import RouterDescription, StepRequest
from arbitrage.core.steps import (
    GeneratedStep,
    ModelIdentity,
    Sampling,
    Source,
    Step,
    StopReason,
    Trajectory,
)
from arbitrage.v1 import generator_pb2, prm_pb2, router_pb2, trajectory_pb2
from services.rpc import convert

texts = st.text(st.characters(codec="utf-8"), max_size=20)
counts = st.integers(0, 2**32 - 1)
identities = st.builds(ModelIdentity, texts, texts)
steps = st.builds(Step, texts, st.sampled_from(Source), st.sampled_from(StopReason))
# Decimals of the length that people write, which a float field gives back as they were.
decimals = st.integers(0, 100_000).map(lambda n: n / 100_000)
samplings = st.builds(
    Sampling,
    temperature=decimals.map(lambda x: round(2 * x, 5)),
    top_p=decimals.filter(bool),
    top_k=counts,
    seed=st.none() | st.integers(0, 2**64 - 1),
)
times_s = st.integers(1, 10**15).map(lambda nanos: nanos / 1e9)
requests = st.builds(
    StepRequest,
    st.builds(Trajectory, texts, st.lists(steps, max_size=4).map(tuple)),
    st.integers(1, 2**32 - 1),
    samplings,
    counts,
    st.booleans(),
    st.none() | times_s,
)
generated = st.builds(
    GeneratedStep,
    texts,
    st.sampled_from(StopReason),
    counts,
    identities,
    st.none() | decimals,
    counts,
    counts,
)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(requests)
def test_a_step_request_is_the_same_after_the_way(request: StepRequest) -> None:
    again = convert.step_request_from_proto(convert.step_request_to_proto(request), 9)
    if request.time_limit_s is not None:
        assert again.time_limit_s == pytest.approx(request.time_limit_s)
    assert (again.trajectory, again.sampling) == (request.trajectory, request.sampling)
    assert again.max_tokens == request.max_tokens
    assert again.entropy_token_count == request.entropy_token_count
    assert again.stream_text == request.stream_text


@given(generated)
def test_a_generated_step_is_the_same_after_the_way(step: GeneratedStep) -> None:
    assert convert.generated_step_from_proto(convert.generated_step_to_proto(step)) == step


@given(identities, decimals, st.lists(decimals, unique=True, max_size=6), st.booleans(), texts)
def test_a_router_is_the_same_after_the_way(
    model: ModelIdentity, threshold: float, values: list[float], annotated: bool, rule: str
) -> None:
    rising = tuple(sorted(values))
    table = CalibrationTable(rising, tuple(reversed(rising)))
    description = RouterDescription(model, threshold, table, annotated, rule)
    assert convert.router_from_proto(convert.router_to_proto(description)) == description


@given(float32s)
def test_the_shortest_decimal_is_the_same_float_field(value: float) -> None:
    assert struct.pack("f", convert.shortest(value)) == struct.pack("f", value)


@given(float32s, float32s)
def test_the_shortest_decimal_keeps_order(one: float, other: float) -> None:
    assert (convert.shortest(one) < convert.shortest(other)) == (one < other)


def test_a_time_a_clock_rounded_below_zero_is_zero() -> None:
    assert convert.duration_to_proto(-1e-9) == Duration()


def test_every_value_of_every_shared_enum_has_its_place_on_the_wire() -> None:
    for wire, kind in (
        (trajectory_pb2.Source, Source),
        (trajectory_pb2.StopReason, StopReason),
    ):
        assert len(wire.keys()) == len(kind) + 1


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (trajectory_pb2.Step(text="a", stop_reason=trajectory_pb2.STOP_REASON_SEPARATOR), "source"),
        (trajectory_pb2.Step(text="a", source=trajectory_pb2.SOURCE_DRAFT), "stop_reason"),
    ],
)
def test_an_enum_that_is_not_set_is_named_by_its_path(
    step: trajectory_pb2.Step, field: str
) -> None:
    good = trajectory_pb2.Step(
        source=trajectory_pb2.SOURCE_DRAFT, stop_reason=trajectory_pb2.STOP_REASON_SEPARATOR
    )
    with pytest.raises(FieldInvalid) as raised:
        convert.steps_from_proto([good, step])
    assert raised.value.field == f"steps[1].{field}"


def test_more_steps_than_any_solution_has_are_refused_before_they_are_read() -> None:
    # None of them is a step, but nobody comes to that.
    with pytest.raises(FieldInvalid, match="steps: must be at most 16384, got 16385 steps"):
        convert.steps_from_proto([trajectory_pb2.Step()] * 16_385)


@pytest.mark.parametrize("temperature", [-0.1, 2.5, math.nan, math.inf])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(SamplingOutOfRange, match=r"sampling\.temperature"):
        convert.sampling_from_proto(trajectory_pb2.SamplingConfig(temperature=temperature))


@pytest.mark.parametrize("top_p", [-0.1, 1.5, math.nan])
def test_a_nucleus_out_of_range_is_refused(top_p: float) -> None:
    with pytest.raises(SamplingOutOfRange, match=r"sampling\.top_p"):
        convert.sampling_from_proto(trajectory_pb2.SamplingConfig(top_p=top_p))


def test_an_unset_sampling_is_greedy_decoding() -> None:
    assert convert.sampling_from_proto(trajectory_pb2.SamplingConfig()) == Sampling()


@pytest.mark.parametrize("limit", [Duration(), Duration(seconds=-1), Duration(nanos=-5)])
def test_a_time_limit_that_is_no_time_is_refused(limit: Duration) -> None:
    with pytest.raises(BudgetOutOfRange, match="time_limit"):
        convert.step_request_from_proto(
            generator_pb2.GenerateStepRequest(problem="p", time_limit=limit), 9
        )


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan])
def test_a_score_that_is_no_probability_is_a_defect_of_its_model(score: float) -> None:
    with pytest.raises(Internal, match="outside"):
        convert.advantage_from_proto(router_pb2.EstimateAdvantageResponse(score=score))
    with pytest.raises(Internal, match="outside"):
        convert.reward_from_proto(prm_pb2.ScoreStepsResponse(scores=[score]))


def test_a_prm_that_sends_two_scores_for_one_step_is_not_believed() -> None:
    with pytest.raises(Internal, match="2 scores"):
        convert.reward_from_proto(prm_pb2.ScoreStepsResponse(scores=[0.1, 0.2]))


def test_a_calibration_table_that_does_not_fall_is_not_believed() -> None:
    points = [router_pb2.CalibrationPoint(threshold=t, target_share=t) for t in (0.1, 0.2)]
    with pytest.raises(Internal, match="calibration"):
        convert.router_from_proto(router_pb2.GetRouterResponse(calibration=points))


@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_an_entropy_that_is_no_number_is_refused(entropy: float) -> None:
    message = generator_pb2.GeneratedStep(stop_reason="STOP_REASON_SEPARATOR")
    message.first_token_entropy = entropy
    with pytest.raises(FieldInvalid, match=r"result\.first_token_entropy"):
        convert.generated_step_from_proto(message)


@pytest.mark.parametrize("field", ["prior_logit_shift", "advantage_margin"])
def test_a_router_whose_correction_is_no_number_is_refused(field: str) -> None:
    message = router_pb2.GetRouterResponse()
    setattr(message, field, math.nan)
    with pytest.raises(Internal, match=f"{field} nan is no finite number"):
        convert.router_from_proto(message)


def test_a_model_with_an_odd_name_cannot_break_the_line_of_an_error() -> None:
    message = router_pb2.EstimateAdvantageResponse(score=2.0)
    message.model.model_id = "a\nb"
    with pytest.raises(Internal) as raised:
        convert.advantage_from_proto(message)
    assert str(raised.value).isprintable()
