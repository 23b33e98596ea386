// A caption of a picture, by ONNX Runtime alone: ./caption model.onnx photo.ppm
#include <onnxruntime_cxx_api.h>

#include <fstream>
#include <iostream>
#include <vector>

int main(int, char** arguments) {
    std::ifstream photo(arguments[2], std::ios::binary);
    std::string kind;
    int64_t width, height, largest;
    photo >> kind >> width >> height >> largest;
    photo.get();
    std::vector<uint8_t> pixels(height * width * 3);
    photo.read(reinterpret_cast<char*>(pixels.data()), pixels.size());

    Ort::Env environment;
    Ort::Session session(environment, arguments[1], Ort::SessionOptions());
    auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
    const int64_t sizes[] = {height, width, 3}, none[] = {0};
    Ort::Value inputs[] = {Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), sizes, 3),
                           Ort::Value::CreateTensor<float>(memory, nullptr, 0, none, 1)};
    const char *names[] = {"image", "options"}, *texts[] = {"texts"};
    auto made = session.Run(Ort::RunOptions(), names, inputs, 2, texts, 1);
    std::cout.write(made[0].GetTensorData<char>(), made[0].GetTensorTypeAndShapeInfo().GetElementCount()) << "\n";
}
