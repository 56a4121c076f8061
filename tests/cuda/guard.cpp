// What torch's C++ asks of CUDA, answered for two devices that do not exist, so that a build for CPUs takes tensors that
// say "cuda". Devices and streams are only remembered, by thread; what happens on them is booked in fake_cuda.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using c10::StreamId;

namespace {
constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex device = 0;
thread_local StreamId streams[DEVICES] = {0, 0};

DeviceIndex swap_device(DeviceIndex to) {
  const auto from = device;
  if (to >= 0) device = to;
  return from;
}
DeviceIndex known(DeviceIndex i) { return i < 0 ? device : i; }
Stream stream_of(DeviceIndex i, StreamId id) { return Stream(Stream::UNSAFE, Device(c10::kCUDA, i), id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device to) const override { return {c10::kCUDA, swap_device(to.index())}; }
  Device getDevice() const override { return {c10::kCUDA, device}; }
  void setDevice(Device to) const override { swap_device(to.index()); }
  void uncheckedSetDevice(Device to) const noexcept override { swap_device(to.index()); }
  Stream getStream(Device of) const noexcept override { return stream_of(known(of.index()), streams[known(of.index())]); }
  Stream getNewStream(Device of, int) const override { return getStream(of); }
  Stream exchangeStream(Stream to) const noexcept override {
    const auto i = known(to.device_index());
    return stream_of(i, std::exchange(streams[i], to.id()));
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
Guard guard;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator one = at::detail::createCPUGenerator();
    return one;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  DeviceIndex deviceCount() const override { return DEVICES; }
  int getNumGPUs() const override { return DEVICES; }
  DeviceIndex current_device() const override { return device; }
  DeviceIndex getCurrentDevice() const override { return device; }
  void setCurrentDevice(DeviceIndex to) const override { swap_device(to); }
  DeviceIndex exchangeDevice(DeviceIndex to) const override { return swap_device(to); }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override { return swap_device(to); }
  void deviceSynchronize(DeviceIndex) const override {}
};
} // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

extern "C" {
void install() { c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::kCUDA)].store(&guard); }
int get_device() { return device; }
void set_device(int to) { swap_device(static_cast<DeviceIndex>(to)); }
long get_stream(int of) { return streams[of]; }
void set_stream(int of, long to) { streams[of] = to; }
}
