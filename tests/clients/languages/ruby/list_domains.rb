# Lists the domains of a fleet: `ruby -I build/stubs/ruby list_domains.rb`.
require "virtfleet/compute/v1/domain_services_pb"

def file(name) = File.read(ENV.fetch("VIRTFLEET_#{name}_FILE"))

credentials = GRPC::Core::ChannelCredentials.new(file("CA"), file("KEY"), file("CERT"))
domains = Virtfleet::Compute::V1::DomainService::Stub.new(ENV.fetch("VIRTFLEET_ADDRESS"), credentials)
request = Virtfleet::Compute::V1::ListDomainsRequest.new(parent: "nodes/-", page_size: 2)
begin
  loop do
    page = domains.list_domains(request, deadline: Time.now + 10)
    page.domains.each { |domain| puts "#{domain.name} #{domain.status.state}" }
    break if page.next_page_token.empty?
    request.page_token = page.next_page_token
  end
rescue GRPC::BadStatus => error
  abort "#{error.code}: #{error.details}"
end
