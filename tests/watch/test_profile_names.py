"""Which kernels communicate, by the names that libraries really give them; and which only sound like it."""

import re

import pytest

from pipehc.watch.profiles.names import communicates, doubtful, qualified, short

COMMUNICATION = """
ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)
ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)
ncclSymkDevKernel_AllGather_STMC(ncclSymkDevWorkArgs)
ncclDevKernel_Generic_1(ncclDevKernelArgsStorage<4096ul>)
rcclGenericKernel<1, false>(ncclDevComm*)
mscclKernel_Sum_float_LL(ncclDevComm*)
void mscclpp::collective::allreduceAllPairs<__half>(void*)
nvshmemi_barrier_all_kernel()
void deep_ep::internode::notify_dispatch<false, 2>(int const*)
void deep_ep::internode::cached_notify<false>(int)
void dpsk::ep::internode::cached_notify<1>(x)
void dpsk::ep::internode::combine<__nv_bfloat16>(int4*)
void deep_ep::internode_ll::dispatch<true, false, 7168>(void*)
void deep_ep::internode_ll::clean_low_latency_buffer<32>(int*)
void deep_ep::intranode::barrier<8>(int**, int)
void deep_ep::intranode::combine<__nv_bfloat16, 8, 768, 4096>(int4*)
void deep_ep::elastic::dispatch_impl<8>(int)
void hybrid_ep::dispatch_kernel<x>(int)
void uccl::internode::dispatch<1>(int)
_ZN7deep_ep9intranode15notify_dispatchILi8EEEvPKi
void mori::moe::EpDispatchIntraNodeKernel<float>(mori::moe::EpDispatchCombineArgs<float>)
void userbuffers_fp16_sum_inplace_gpu_rr_rs_oop<4>(int)
kuserbuffers_pushsend(int*, int*, int4*, int4*, int)
kuserbuffers_pushrecv(int, int, int*, int*, int)
void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*, unsigned long)
void c10d::symmetric_memory::(anonymous namespace)::one_shot_all_reduce_kernel<float, 4, 8>(float**)
void <unnamed>::two_shot_all_reduce_kernel_inplace<c10::BFloat16, (int)16, (int)8>(T1 **)
multimem_one_shot_all_reduce_kernel
c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)
void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*, vllm::RankSignals)
void sglang::cross_device_reduce_2stage<__half, 8>(sglang::RankData*)
void quickreduce::allreduce_prototype_twoshot<x>(int)
void tensorrt_llm::kernels::twoShotAllReduceKernel<__nv_bfloat16, 8>(x)
void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<(x)1, __half, 4>(x)
void flashinfer::trtllm_mnnvl_allreduce::oneshotAllreduceFusionKernel<8, __half>(x)
void tensorrt_llm::kernels::moe_comm::moeA2ADispatchKernel<8>(int const*)
tensorrt_llm::kernels::moeAllToAllKernel(x)
my_reduce_scatter_kernel
""".strip().splitlines()

COMPUTATION = """
void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float> > >(x)
void cub::DeviceReduceKernel<cub::DeviceReducePolicy<float>>(float*)
void at::native::_scatter_gather_elementwise_kernel<128, 8>(int, x)
void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128>>(Flash_fwd_params)
void moe_unpermute_combine_kernel<float>(float*)
void small_gather_kernel<float>(float*)
void BlockAllReduceKernel<float>(float*)
void warpAllReduceSum<float>(float*)
void fused_dispatch<float>(float*)
deep_gemm::sm90_fp8_gemm_1d2d_impl
void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*)
void hybrid_ep::permute_kernel<float>(int)
triton_poi_fused_all_gather_into_tensor_cat_0
triton_red_fused__to_copy_all_reduce_mean_3
void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_nn_align8>(cutlass::Params)
void elementwise_kernel<ncclRedOp>(float*)
splitKreduce_kernel
rowsum(ncclLike*)
ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_nn
void all_gather_gemm_kernel<x>(int)
""".strip().splitlines()


@pytest.mark.parametrize("name", COMMUNICATION)
def test_kernels_that_communicate(name):
    assert communicates(name)


@pytest.mark.parametrize("name", COMPUTATION)
def test_kernels_that_compute(name):
    assert not communicates(name)


def test_a_pattern_of_the_users_adds_to_them():
    own = re.compile("^my_.*put")
    assert communicates("my_block_put<1>(x)", own) and communicates("ncclDevKernel_SendRecv", own)
    assert not communicates("your_put", own) and not communicates("my_block_put")


def test_names_that_sound_like_communication_are_doubtful():
    assert doubtful("void fused_dispatch<float>(float*)") and doubtful("peer_copy(x)")
    assert not doubtful("gemm") and not doubtful("void flash::flash_fwd_splitkv_combine_kernel<x>(y)")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("void a::b<int, c<4>>(float*, d<int>)", "a::b"),
        ("void (anonymous namespace)::k<c10::BFloat16, 16>(unsigned int**)", "k"),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int>(x)", "internal::gemvx::kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
        ("gemm", "gemm"),
        ("gemm(int) [clone .kd]", "gemm"),
        ("", ""),
        ("<<<", ""),
    ],
)
def test_names_without_types_and_arguments(name, plain):
    assert qualified(name) == plain
    assert short(name) == (plain or name)
