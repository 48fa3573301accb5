// Lists the domains of a fleet, with the stubs of `make stubs LANGUAGE=cpp`.
#include <grpcpp/grpcpp.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

#include "virtfleet/compute/v1/domain.grpc.pb.h"

namespace api = virtfleet::compute::v1;

static std::string file(const char *variable) {
  std::ifstream stream(std::getenv(variable));
  return {std::istreambuf_iterator<char>(stream), {}};
}

int main() {
  auto credentials = grpc::SslCredentials({file("VIRTFLEET_CA_FILE"), file("VIRTFLEET_KEY_FILE"), file("VIRTFLEET_CERT_FILE")});
  auto domains = api::DomainService::NewStub(grpc::CreateChannel(std::getenv("VIRTFLEET_ADDRESS"), credentials));
  api::ListDomainsRequest request;
  request.set_parent("nodes/-");
  request.set_page_size(2);
  for (api::ListDomainsResponse page; ; request.set_page_token(page.next_page_token())) {
    grpc::ClientContext context;
    grpc::Status status = domains->ListDomains(&context, request, &page);
    if (!status.ok()) return std::cerr << status.error_code() << ": " << status.error_message() << "\n", 1;
    for (const auto &domain : page.domains())
      std::cout << domain.name() << " " << api::DomainState_Name(domain.status().state()) << "\n";
    if (page.next_page_token().empty()) return 0;
  }
}
